"""Which model types work stands in a table, and nobody forgets one."""

import json
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES

from slimvlm.compress.models.families import JOINS

RECORDS = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "types.json").read_text(encoding="utf-8"))
MISSING = "nobody has looked at them: python benchmarks/breadth.py, then make readme"


def test_every_type_of_transformers_is_a_row_of_the_table():
    assert sorted(set(TYPES) - set(RECORDS)) == [], MISSING


@pytest.mark.parametrize("model_type", sorted(set(JOINS) & set(TYPES)))
def test_every_type_with_a_row_in_the_family_table_was_cut_reloaded_and_evaluated(model_type):
    said = RECORDS[model_type]["stages"]
    assert [stage for stage in ("cut", "reload", "evaluate") if said.get(stage) != "ok"] == []


def test_every_type_that_does_not_come_to_its_end_says_why():
    short = {name for name, record in RECORDS.items() if record["stages"].get("export") != "ok"}
    assert {name for name in short if not RECORDS[name].get("why")} == set()
