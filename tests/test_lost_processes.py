"""One of several processes is killed: the others end at once, with one sentence; what was finished goes on later."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from pairs import assert_done, run_together, started
from safetensors.torch import load_file

from slimvlm.demo import MODEL, SAMPLES

FILES = ("--data", SAMPLES / "train.jsonl", "--eval-data", SAMPLES / "val.jsonl", "--export", "none", "--no-profile")
SIZES = ("--samples", 24, "--eval-samples", 12, "--rounds", 2, "--batch-size", 8, "--criterion", "fisher")
TRAINING = ("--recover", "sft", "--steps", 6, "--train-batch-size", 8, "--validation-samples", 16, "--warmup", 1)
EXACT = ("--checkpoint-every", 2, "--dropout", 0, "--precision", "no", "--validate-every", 6)


def words(out: Path, *more: object) -> list[object]:
    return ["slimvlm", "compress", MODEL, out, *FILES, *SIZES, *TRAINING, *EXACT, *more]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert_done(run_together(out.parent, 2, words(out)))
    return out


@pytest.mark.parametrize(("killed", "event", "count"), [(0, "order.partial.safetensors", 2), (1, "recovery", 1)])
def test_a_killed_process_ends_the_others_and_another_number_goes_on(
    killed: int, event: str, count: int, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "out"
    with started(tmp_path, words(out), words(out)) as processes:
        while not list(out.glob(f"{event}*")):
            assert processes[killed].runs(), "it ended before it was to be killed"
        assert processes[killed].kill() == -signal.SIGKILL
        began = time.monotonic()
        other = processes[1 - killed]
        assert other.wait() == 3
        assert time.monotonic() - began < 60
        said = [line for line in other.stderr.read_text().splitlines() if line.startswith("Error:")]
        assert len(said) == 1 and f"process {killed} on " in said[0] and "--resume" in said[0]
        assert "Traceback" not in other.stderr.read_text()
    assert_done(run_together(tmp_path, count, words(out, "--resume")))
    assert (out / "plan.json").read_bytes() == (uninterrupted / "plan.json").read_bytes()
    resumed, whole, cut = (
        load_file(folder / "model.safetensors")
        for folder in (out / "model", uninterrupted / "model", uninterrupted / "cut")
    )
    for name, value in whole.items():
        moved = (value.float() - cut[name].float()).norm()
        assert (value.float() - resumed[name].float()).norm() <= 0.05 * moved + 1e-6, name
