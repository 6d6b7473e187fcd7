"""The recover stage block by block: what stands in the record, alone and before a training on a frozen base."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from short_recoveries import SHORT, options_in
from tiny_folders import write_tiny

from slimvlm.pipeline import compress, recover_run
from slimvlm.serve.report.document import Table
from slimvlm.serve.report.files import read_run
from slimvlm.serve.report.sections.training import recovery_section

pytestmark = pytest.mark.usefixtures("undrawn")


def test_blocks_learn_by_themselves_alone_and_before_the_whole(tmp_path: Path) -> None:
    asked = {"recall": False, "learning_rate": 0.003}
    compress(options_in(tmp_path, recover="blockwise", **asked))
    run = tmp_path / "out"
    alone = _recovered(run)
    assert [(part["name"], part["steps"]) for part in alone["stages"]] == [("blocks", 8)]
    tables = [one for one in recovery_section(read_run(run)) if isinstance(one, Table)]
    assert [len(one.rows) for one in tables if one.title.startswith("Blocks")] == [len(alone["blocks"])]
    recover_run(run, {**SHORT, **asked, "recover": "blockwise+sft", "frozen": "int8"})
    both = _recovered(run)
    assert [(part["name"], part["steps"]) for part in both["stages"]] == [("blocks", 2), ("task", 6)]
    (table,) = (one for one in recovery_section(read_run(run)) if isinstance(one, Table) and one.title == "Validations")
    assert [row[0] for row in table.rows] == ["2", "6", "8"]  # in steps of all


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_student_and_a_teacher_read_block_by_block_give_the_weights_of_whole_ones(tmp_path: Path, train: str) -> None:
    model, data = write_tiny(tmp_path)
    asked = {"recover": "blockwise", "train": train, "learning_rate": 0.003, "precision": "no"}
    asked |= {
        "model": str(model),
        "data": data,
        "eval_data": None,
        "eval_samples": 4,
        "validation_samples": 4,
        "ratio": 0.2,
    }
    asked |= {"rank": 4} if train == "lora" else {}
    found = []
    for stream in ("off", "on"):
        (tmp_path / stream).mkdir()
        compress(options_in(tmp_path / stream, stream=stream, **asked))
        run = tmp_path / stream / "out"
        facts = json.loads((run / "run.json").read_text())["stages"]["recover"]
        weights, cut = (load_file(run / name / "model.safetensors") for name in ("model", "cut"))
        assert facts["helped"] and any(not value.equal(cut[name]) for name, value in weights.items())
        found.append((facts, weights))
    (off, whole), (on, streamed) = found
    assert [one["block"] for one in on["blocks"]] == [one["block"] for one in off["blocks"]]
    assert on["merged_difference"] <= 1e-5
    for name, weight in whole.items():
        assert (streamed[name] - weight).norm() <= 1e-2 * weight.norm() + 1e-6, name


def _recovered(run: Path) -> dict:
    """What the record says, where it says what is so."""
    facts = json.loads((run / "run.json").read_text())["stages"]["recover"]
    assert facts["steps"] == 8
    assert {one["steps"] for one in facts["blocks"]} == {facts["stages"][0]["steps"]}
    assert all(one["after"] <= one["before"] for one in facts["blocks"])
    assert facts["stages"][0]["last_loss"] < facts["stages"][0]["first_loss"]
    assert facts["helped"] == (facts["best_step"] > 0)
    assert not (run / "recovery").exists()
    cut, model = (load_file(run / name / "model.safetensors") for name in ("cut", "model"))
    changed = {name for name in cut if not cut[name].equal(model[name])}
    assert bool(changed) == facts["helped"]
    assert all(".layers." in name for name in changed)  # what was frozen is the float weights again
    return facts
