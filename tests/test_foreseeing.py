"""`slimvlm compress --dry-run`: what a run would do, against what it does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_folders import write_tiny

from slimvlm.cli import main
from slimvlm.compress.plan import Plan

SHORT = ("--ratio", 0.4, "--rounds", 2, "--samples", 4, "--eval-samples", 4, "--steps", 3, "--train-batch-size", 2)
ALONE = ("--export", "none", "--no-profile", "--device", "cpu", "--validation-samples", 2)


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, ["compress", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its time and its size."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("foreseen")
    write_tiny(where)
    return where


@pytest.fixture(scope="module")
def asked(folder: Path) -> tuple[object, ...]:
    return (folder / "my-vlm", folder / "out", "--data", folder / "samples.jsonl", *SHORT, *ALONE, "--quiet")


@pytest.fixture(scope="module")
def foreseen(folder: Path, asked: tuple[object, ...]) -> dict:
    before = state(folder)
    result = run(*asked, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert state(folder) == before  # nothing is touched
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def made(folder: Path, asked: tuple[object, ...], foreseen: dict) -> Path:
    """The run itself, in the folder that was looked at."""
    assert run(*asked).exit_code == 0
    return folder / "out"


def test_what_is_foreseen_is_what_the_run_does(foreseen: dict, made: Path) -> None:
    plan = Plan.from_json((made / "plan.json").read_text(encoding="utf-8"))
    stages = json.loads((made / "run.json").read_text(encoding="utf-8"))["stages"]
    removed = plan.parameters_before - plan.parameters_after
    assert foreseen["removed"] == pytest.approx(removed, rel=0.05)
    assert foreseen["inspection"]["parameters"] == plan.parameters_before
    assert foreseen["samples"]["calibration"] == stages["plan"]["calibration_samples"]
    assert foreseen["samples"]["evaluation"] == stages["evaluate"]["samples"]
    assert foreseen["samples"]["training"] == stages["recover"]["samples"]
    assert {step["name"] for step in foreseen["steps"]} == set(stages) - {"export", "profile", "frontier"}
    for name in ("model", "cut"):
        size = sum(file.stat().st_size for file in (made / name).glob("*.safetensors"))
        assert foreseen["files"][name] == pytest.approx(size, rel=0.2)
    assert all(step["seconds"] > 0 for step in foreseen["steps"])
    assert foreseen["calibration_bytes"] > 10**7 and foreseen["recovery_bytes"] > 10**7


def test_the_record_of_the_run_asks_for_the_same_recovery_and_outputs(folder, asked, made) -> None:
    first = main.commands["compress"].make_context("compress", [str(word) for word in asked]).params
    words = [str(folder / "again"), "--config", str(made / "run.json"), "--quiet", "--device", "cpu"]
    again = main.commands["compress"].make_context("compress", words).params
    assert again.pop("out") == folder / "again" and first.pop("out") == folder / "out"
    # What was left open is written down as it was filled in.
    resolved = {"samples": 4, "train_batch_size": 2, "schedule": "cosine", "warmup": 10, "clip": 1.0}
    assert again == {**first, **resolved}


def test_it_is_said_in_words_and_a_run_that_is_there_stays_as_it_is(folder, asked, made) -> None:
    before = state(folder)
    held = run(*asked, "--dry-run")
    assert held.exit_code == 3 and "--resume, or replace it with --overwrite" in held.stderr
    done = run(*asked, "--dry-run", "--resume")
    assert done.exit_code == 0 and done.stdout.count(" done  ") == 4  # plan, slice, recover, evaluate
    anew = run(*asked, "--dry-run", "--overwrite", "--criterion", "magnitude", "--recover", "none", "--export", "onnx")
    assert anew.exit_code == 0 and "magnitude reads no samples" in anew.stdout
    assert "export (onnx, fp32)" in anew.stdout and "in the recovery" not in anew.stdout
    assert re.search(r"^export +\d+ (s|min)", anew.stdout, re.M) and re.search(r"^slice +\d+ s", anew.stdout, re.M)
    words = ("--recover", "blockwise", "--train", "full", "--dry-run", "--json")
    alone = json.loads(run(asked[0], folder / "another", *asked[2:], *words).stdout)
    (recover,) = (step for step in alone["steps"] if step["name"] == "recover")
    assert recover["does"].startswith("3 steps of 2, 3 of them by every block alone, 3 validations")
    assert recover["seconds"] > 0 and alone["recovery_bytes"] > 10**7 and alone["files"]["recovery"] > 0
    assert state(folder) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ratio", 0.999), "the largest possible here is"),
        (("--taylor", "mix"), "--taylor mix is a variant"),
        (("--export", "gguf"), "the format gguf is unknown"),
        (("--train-batch-size", 4000), "less than one batch"),
    ],
)
def test_what_a_run_would_refuse_is_refused(folder, asked, words, says) -> None:
    model, _, *rest = asked
    result = run(model, folder / "another", *rest, *words, "--dry-run")
    assert result.exit_code == 3 and says in result.stderr
    assert not (folder / "another").exists()
