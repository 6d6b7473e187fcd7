"""The tables of the README and of the model card are what the benchmark prints from its stored measurements."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from slimvlm.serve.study.choosing import summaries
from slimvlm.serve.study.study import rows_in
from slimvlm.serve.study.tables import words

ROOT = Path(__file__).parents[1]


RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def earlier() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("earlier", ROOT / "benchmarks" / "earlier.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_printed_recovery_tables_are_the_measured_ones(earlier, capsys):
    earlier.print_tables(RESULTS / "recovery.jsonl")
    page = (ROOT / "docs" / "recovery.md").read_text()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert [table for table in tables if table not in page] == []
    assert len(tables) == 6


def test_every_score_of_a_recovery_says_its_split(earlier):
    splits = {}
    for name in ("recovery", "recovery_tuning"):
        rows = earlier.read(RESULTS / f"{name}.jsonl")
        splits[name] = {row.get("split") for row in rows if "score" in row}
    assert splits == {"recovery": {"test"}, "recovery_tuning": {"val"}}


@pytest.mark.parametrize(("ratio", "data"), [(0.35, "all"), (0.5, "all"), (0.5, "5%"), (0.7, "5%")])
def test_lpd_beats_full_fine_tuning_with_every_seed_where_the_page_says_so(earlier, ratio, data):
    asked = {"cut": "default", "ratio": ratio, "data": data, "steps": 300}
    scores = {"lpd": {}, "full": {}}
    for row in earlier.read(RESULTS / "recovery.jsonl"):
        if row.get("recipe") in scores and all(row[name] == value for name, value in asked.items()):
            scores[row["recipe"]][row["seed"]] = row["score"]
    assert len(scores["lpd"]) == 3
    assert all(scores["lpd"][seed] > scores["full"][seed] for seed in range(3))


def test_the_readme_is_at_most_120_lines_beside_the_tables_of_the_registries():
    by_hand = re.sub(r"\[\[\[cog .*?\[\[\[end", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(by_hand.splitlines()) <= 120


STUDIES = ("demo", "demo-recovery", "real-parts")


@pytest.mark.parametrize(
    ("page", "least"), [("README.md", 4), ("demo/README.md", 6), ("docs/choosing.md", 2), ("docs/study.md", 60)]
)
def test_every_cell_of_a_study_is_printed_as_it_was_measured(page, least):
    cells: dict[str, set[str]] = {}
    for name in STUDIES:
        for one in summaries(rows_in(RESULTS / f"{name}-study.jsonl")):
            cells.setdefault(one.method, set()).add(words(one))
    rows = [line.strip("| ").split(" | ") for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    shown = [(method, figures[:-1]) for method, *figures in rows if method in cells]
    assert len(shown) >= least
    assert [(method, one) for method, figures in shown for one in figures if one not in {*cells[method], "-"}] == []
