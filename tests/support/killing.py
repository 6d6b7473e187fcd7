"""Jobs of several processes of which one is killed at a moment that its output tells: what the others do, and whether
`--resume` ends with the plan and the weights of a job that nobody disturbed.
"""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

from pairs import run_together, started
from safetensors.torch import load_file

from slimvlm.demo import MODEL, SAMPLES

FILES = ("--data", SAMPLES / "train.jsonl", "--eval-data", SAMPLES / "val.jsonl", "--export", "none", "--no-profile")
SIZES = ("--samples", 24, "--eval-samples", 12, "--rounds", 2, "--batch-size", 4, "--criterion", "fisher")
TRAINING = ("--recover", "sft", "--steps", 6, "--train-batch-size", 8, "--validation-samples", 16, "--warmup", 1)
EXACT = ("--checkpoint-every", 2, "--dropout", 0, "--precision", "no", "--validate-every", 6)
PATIENCE = 60.0  # seconds that the others may take to end
STARTED = 2  # processes that are started
RESUMED = (1, 2, 4)  # and those that go on
ROUNDED = 5e-3  # of a refitted weight, where its sums were added in another order


@dataclass(frozen=True)
class Moment:
    """When `times` lines of the first process's output, or of `file` in the run's folder, match `pattern`, the process
    `killed` dies; so many as `resumed` go on.
    """

    killed: int
    pattern: str
    times: int
    resumed: int
    file: str | None = None

    def has_come(self, out: Path, said: Path) -> bool:
        path = said if self.file is None else out / self.file
        return path.exists() and len(re.findall(self.pattern, path.read_text(errors="replace"), re.M)) >= self.times


STAGES = (  # pattern, most times, file: from the calibration of the first round to the last steps
    (r"^round 1 of 2: calibrate ", 1, None),
    (r"^round 1 of 2: refit ", 1, None),
    (r"rounds", 1, "order.partial.safetensors"),
    (r"^round 2 of 2: calibrate ", 1, None),
    (r'"slice": \{\s*"status": "running"', 1, "run.json"),
    (r"^refit ", 1, None),
    (r'"tensors"', 1, "recovery/state.json"),
    (r'"loss"', 5, "recovery/recovery.jsonl"),
)


def drawn(seed: int, count: int) -> list[Moment]:
    """So many moments, over all stages in turn."""
    draw = random.Random(seed)
    stages = [STAGES[index % len(STAGES)] for index in range(count)]
    return [
        Moment(draw.randrange(STARTED), pattern, draw.randint(1, most), draw.choice(RESUMED), file)
        for pattern, most, file in stages
    ]


def words(out: Path, *more: object) -> list[object]:
    """The command."""
    return ["slimvlm", "compress", MODEL, out, *FILES, *SIZES, *TRAINING, *EXACT, *more]


def undisturbed(folder: Path) -> Path:
    """The run folder of a job that nobody disturbs."""
    out = folder / "out"
    faults = _failed(run_together(folder, STARTED, words(out)))
    assert not faults, faults
    return out


def fault(folder: Path, moment: Moment, whole: Path) -> str | None:
    """What was wrong when a process was killed at this moment, and when others went on; None: nothing."""
    out = folder / "out"
    with started(folder, *[words(out)] * STARTED) as running:
        victim = running[moment.killed]
        while not moment.has_come(out, running[0].stderr):
            if not victim.runs():
                return "the job ended before the moment came: " + victim.stderr.read_text()[-300:]
        victim.kill()
        began = time.monotonic()
        for other in running:
            if other is not victim:
                code, seconds = other.wait(), time.monotonic() - began
                errors = [line for line in other.stderr.read_text().splitlines() if line.startswith("Error:")]
                if code != 3 or len(errors) != 1 or "Traceback" in other.stderr.read_text() or seconds > PATIENCE:
                    return f"another ended after {seconds:.0f} s with {code}: {other.stderr.read_text()[-1000:]}"
                if f"process {moment.killed} on " not in errors[0] or "--resume" not in errors[0]:
                    return f"it did not say who was gone: {errors[0]}"
    if failed := _failed(run_together(folder, moment.resumed, words(out, "--resume"))):
        return f"{moment.resumed} could not go on: {failed}"
    return _different(out, whole)


def _failed(ended: list) -> str:
    return "; ".join(process.stderr.read_text()[-1000:] for process in ended if process.returncode != 0)


def _different(out: Path, whole: Path) -> str | None:
    """Another plan, or weights that are apart by more than 5 % of what the training moved them, and rounding."""
    if (out / "plan.json").read_bytes() != (whole / "plan.json").read_bytes():
        return "another plan"
    folders = (out / "model", whole / "model", whole / "cut")
    resumed, expected, before = (load_file(folder / "model.safetensors") for folder in folders)
    for name, value in expected.items():
        apart, moved = (value.float() - resumed[name].float()).norm(), (value.float() - before[name].float()).norm()
        if not apart <= 0.05 * moved + ROUNDED * value.float().norm() + 1e-6:
            return f"{name} is apart by {apart:.2e}, of {moved:.2e} that it moved"
    return None
