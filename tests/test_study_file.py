"""The file of a study: what its rows become, and what is wrong with it in a sentence."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from slimvlm.cli import main
from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.recovery.checks import recipe_of
from slimvlm.compress.stages.plan import planning_of
from slimvlm.console.commands.study_file import read_cells
from slimvlm.serve.study.options import StudyOptions

ROOT = Path(__file__).resolve().parents[1]
BED = """
[bed.tiny]
model = "some/model"
data = "train.jsonl"
val = "val.jsonl"
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    return tmp_path


def cells(folder, text, name="study.toml"):
    (folder / name).write_text(text)
    return read_cells(folder / name)


def test_a_list_is_an_axis_and_a_row_has_all_combinations(folder):
    found = cells(
        folder,
        BED
        + """
        [all]
        ratio = [0.2, 0.5]
        seed = [0, 1]
        recover = "none"
        [[row]]
        criterion = ["gate", "taylor"]
        rounds = 1
        [[row]]
        name = "{criterion} by layer"
        allocator = "local"
        kind-ratio = { attention = 0.1 }
        """,
    )
    names = ["criterion gate, rounds 1", "criterion taylor, rounds 1", "gate by layer"]
    assert list(dict.fromkeys(one.method for one in found)) == names
    assert len(found) == 3 * 2 * 2
    assert {one.options.kind_ratio.get("attention") for one in found} == {None, 0.1}
    assert {(one.options.ratio, one.largest, one.options.seed) for one in found} == (
        {(ratio, ratio, seed) for ratio in (0.2, 0.5) for seed in (0, 1)}
    )
    assert found[0].options.data == folder / "train.jsonl" and found[0].options.model == "some/model"


def test_every_row_of_the_registries_can_be_named(folder):
    names = {"criterion": list(CRITERIA), "allocator": list(ALLOCATORS)}
    rows = "".join(f"[[row]]\nrounds = 1\n{axis} = {json.dumps(values)}\n" for axis, values in names.items())
    found = cells(folder, BED + rows)
    assert {one.options.criterion for one in found} == set(CRITERIA)
    assert {one.options.allocator for one in found} == set(ALLOCATORS)


def test_one_plan_for_all_ratios_is_that_of_the_largest_in_equal_rounds(folder):
    found = cells(folder, f"{BED}\n[[row]]\nratio = [0.35, 0.7]\none-plan = true\n")
    assert [(one.options.ratio, one.largest, one.options.equal_rounds) for one in found] == [
        (0.35, 0.7, True),
        (0.7, 0.7, True),
    ]


def test_json_says_the_same_as_toml(folder):
    bed = {"model": "some/model", "data": "train.jsonl", "val": "val.jsonl"}
    document = {"bed": {"tiny": bed}, "row": [{"criterion": ["gate", "taylor"], "rounds": 1}]}
    assert cells(folder, json.dumps(document), "study.json") == (
        cells(folder, f'{BED}\n[[row]]\ncriterion = ["gate", "taylor"]\nrounds = 1\n')
    )


def test_what_is_written_down_names_no_folder_of_this_machine(folder):
    (found,) = cells(folder, f'{BED}\n[[row]]\nrecover = "sft"\nrecover-data = "train.jsonl"\n')
    assert found.said["recover_data"] == "train.jsonl"
    assert str(folder) not in json.dumps(found.said)


WRONG = [
    ("[[row]]\ncriterion = 'gait'", "row 1.criterion: 'gait' is not one of 'ukmi'"),
    ("[[row]]\nallocator = ['global', 'fair']", "row 1.allocator: 'fair' is not one of"),
    ("[[row]]\ncriterium = 'gate'", "row 1: key 'criterium' is unknown; the nearest is criterion"),
    ("[[row]]\nratio = 1.5", "row 1.ratio: 1.5 is not in the range 0<x<1"),
    ("[[row]]\nratio = [0.2, true]", "row 1.ratio: True is no value of it"),
    ("[[row]]\nrounds = 'many'", "row 1.rounds: 'many' is not a valid integer"),
    ("[[row]]\nrecover = 5", "row 1.recover: 5 is no value of it"),
    ("[[row]]\ncriterion = []", "row 1: criterion: it has no value"),
    ("[[row]]\nkind-ratio = { heads = 0.1 }", "row 1.kind-ratio: 'heads' is not one of attention, mlp"),
    ("[[row]]\ndevice = 'cpu'", "row 1: key 'device' is for [bed.NAME]"),
    ("[[row]]\nbed = 'big'", "row 1: bed: 'big' is unknown; known are tiny"),
    ("[[row]]\nname = '{colour}'", "row 1: name: '{colour}' is no name"),
    ("[[row]]\none-plan = 1", "row 1: one-plan: 1 is not true or false"),
    ("[[row]]\nname = 'a'\n[[row]]\nname = 'a'\nrounds = 1", "two rows are called 'a'"),
    ("[[row]]\nname = 'dense'", "row dense: that is what the model without a cut is called"),
    ("[row]\nrounds = 1", "is not a list"),
    ("[rows]\na = 1", "key 'rows' is unknown; the nearest is row"),
    ("[[row]\n", "it is not TOML"),
    ("[bed.other]\nmodel = 'a'\ndata = 'none.jsonl'\nval = 'val.jsonl'", "bed other.data: "),
    ("[bed.other]\nmodel = 'a'\ndata = 'train.jsonl'", "bed other: key 'val' is missing"),
    ("[bed.'../x']\nmodel = 'a'\ndata = 'train.jsonl'\nval = 'val.jsonl'", "bed ../x: its name is of letters"),
    ("", "the study has no cells"),
    ("[[row]]\nallocator = 'paper'", "row 'allocator paper': the allocator paper takes all in one round"),
    ("[[row]]\nrecover = 'lpd+nothing'", "row 'recover lpd+nothing': "),
    ("[[row]]\nsparsity = '2:4'\nallocator = 'ecoflap'", "--allocator has no say with --sparsity 2:4"),
    ("[[row]]\nsparsity = 'unstructured'\nrounds = 2", "row 1: key 'rounds' is unknown"),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[text.replace("\n", " ")[:40] for text, _ in WRONG])
def test_what_is_wrong_with_a_study_is_one_sentence_with_its_place(folder, text, says):
    (folder / "study.toml").write_text(BED + text)
    found = CliRunner().invoke(main, ["study", str(folder / "study.toml"), str(folder / "out"), "-q"])
    assert (found.exit_code, found.stdout) == (3, "")
    assert says in found.stderr and found.stderr.count("\n") == 1, found.stderr
    assert not (folder / "out").exists()


def test_the_test_questions_are_for_rows_that_are_there(folder):
    (folder / "study.toml").write_text(f"{BED}\n[[row]]\nname = 'a'\n")
    words = ["study", str(folder / "study.toml"), str(folder / "out"), "--report-test"]
    assert (
        "--report-test b is no row of this study; choose best or of a" in CliRunner().invoke(main, [*words, "b"]).stderr
    )
    assert "the bed tiny names none" in CliRunner().invoke(main, [*words, "best"]).stderr


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "studies").glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_of_this_project_can_be_made_and_say_how_long_they_take(path, tmp_path):
    shutil.copy(path, tmp_path)
    for named in re.findall(r'"([\w./-]+\.jsonl)"', path.read_text()):
        there = Path(os.path.normpath(tmp_path / named))
        there = there if there.is_relative_to(tmp_path) else tmp_path / there.name
        there.parent.mkdir(parents=True, exist_ok=True)
        there.touch()
    text = (tmp_path / path.name).read_text().replace("../../demo/samples/", "")
    (tmp_path / path.name).write_text(text)
    cells = read_cells(tmp_path / path.name)
    for cell in cells:
        planning_of(cell.options)
        if cell.options.recover != "none":
            recipe_of(cell.options)
    left, seconds = StudyOptions(out=tmp_path / "out", cells=cells, processes=2).left()
    assert left == len(cells) and 300 < seconds < 5 * 3600


def test_a_row_that_names_a_sparsity_has_the_options_of_sparsify_and_those_of_all_that_it_knows(folder):
    (found, other, pattern) = cells(
        folder,
        BED
        + """
        [all]
        ratio = 0.35
        rounds = 3
        samples = 40
        recover = "none"
        [[row]]
        name = "{rule}, {allocator}"
        sparsity = "unstructured"
        rule = ["wanda", "sparsegpt"]
        allocator = "ecoflap"
        [[row]]
        sparsity = "2:4"
        ratio = 0.46
        """,
    )
    assert (found.method, other.method) == ("wanda, ecoflap", "sparsegpt, ecoflap")
    assert (pattern.options.ratio, pattern.zeros.ratio) == (0.46, None)
    assert (found.zeros.samples, found.zeros.ratio, found.options.samples) == (40, 0.35, 40)
    assert found.said["sparsity"] == "unstructured" and "rounds" not in found.said
