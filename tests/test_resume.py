"""Killed with SIGKILL in any stage and resumed, the command ends with the same plan bytes and the same weights."""

import re
import signal
from pathlib import Path

import pytest
from forked import Forked
from safetensors.torch import load_file

from slimvlm.demo import MODEL, SAMPLES

FILES = ("--data", str(SAMPLES / "train.jsonl"), "--eval-data", str(SAMPLES / "val.jsonl"))
NO_EXTRAS = ("--export", "none", "--no-profile")
SIZES = ("--samples", "24", "--eval-samples", "12", "--rounds", "3", "--batch-size", "8", *NO_EXTRAS)
TRAINING = ("--steps", "8", "--train-batch-size", "8", "--validation-samples", "16", "--checkpoint-every", "2")


def command(out: Path, *more: str) -> Forked:
    words = ["slimvlm", "compress", MODEL, out, *FILES, *SIZES, *TRAINING, *more]
    return Forked(out.parent, *words, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    with command(out) as process:
        assert process.wait() == 0, process.stderr.read_text()
    return out


def kill_when_it_says(out: Path, stage: str, times: int) -> None:
    """Start the command and send SIGKILL at the `times`-th progress line of `stage`."""
    with command(out) as process:
        while len(re.findall(rf"^(?:round \d of \d: )?{stage} ", process.stderr.read_text(), re.MULTILINE)) < times:
            assert process.runs(), f"never said {times} lines of {stage}"
        assert process.kill() == -signal.SIGKILL


def kill_when_written(out: Path, file: str, words: str, times: int) -> None:
    """Start the command and send SIGKILL once `file` holds `words` so many times."""
    with command(out) as process:
        while not ((out / file).exists() and (out / file).read_bytes().count(words.encode()) >= times):
            assert process.runs(), f"the command ended before {file} held {words}"
        assert process.kill() == -signal.SIGKILL


@pytest.mark.parametrize(("stage", "times"), [("round", 1), ("calibrate", 3), ("training", 4), ("evaluate", 1)])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, uninterrupted, stage, times):
    out = tmp_path / "out"
    if stage == "round":  # the first of three
        kill_when_written(out, "order.partial.safetensors", "rounds", times)
        assert not (out / "plan.json").exists()
    elif stage == "training":
        kill_when_written(out, "recovery/recovery.jsonl", '"loss"', times)
        assert not (out / "recovery.jsonl").exists()  # the training was not over
    else:
        kill_when_it_says(out, stage, times)
    with command(out, "--resume") as process:
        assert process.wait() == 0, process.stderr.read_text()
    for file in ("plan.json", "order.safetensors"):
        assert (out / file).read_bytes() == (uninterrupted / file).read_bytes()
    assert not (out / "order.partial.safetensors").exists()
    resumed, whole = (load_file(folder / "model" / "model.safetensors") for folder in (out, uninterrupted))
    assert resumed.keys() == whole.keys()
    assert all(resumed[name].equal(whole[name]) for name in whole)
