"""What happened in a training: the facts so far, the lines of `recovery.jsonl`, and the summary at the end."""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import torch

from slimvlm.compress.files.writing import reported_as_output_errors
from slimvlm.compress.run_record import Training

JOURNAL = "recovery.jsonl"

Score = tuple[float, float]  # larger is better, compared one after the other
WORST: Score = (-sys.float_info.max, -sys.float_info.max)  # a validation that gave no number; JSON has no infinity


@dataclass(frozen=True)
class History:
    """What a training did.

    Attributes:
        steps: optimiser steps done, skipped ones included; all of them unless it `stopped_early`.
        seconds: wall-clock time, validations and checkpoints included, over all resumed parts.
        tokens: input tokens without padding, over all processes; `tokens_per_second` over the time of steps alone.
        skipped: steps left out because loss or gradient was not finite.
        first, best, last: validation (score, -loss) before training, at `best_step`, and at the end; None without one,
            or if it was no number.
        helped: whether training improved the validation; if not, the student has its starting weights again.
        peak_memory_bytes: of this process: resident memory on a CPU (since it started), allocated on a GPU.
        stages: name, steps, seconds, tokens, first and last loss of each stage that was reached.
        validations, validation_seconds: how many there were (before, during and at the end), and how long they took.
    """

    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    skipped: int
    best_step: int
    best: Score | None
    first: Score | None
    last: Score | None
    stopped_early: bool
    helped: bool
    peak_memory_bytes: int
    stages: tuple[dict[str, Any], ...]
    validations: int
    validation_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


@dataclass
class TrainerState:
    """What is known so far; saved with every checkpoint.

    Attributes:
        step: steps done.
        streak: steps skipped in a row.
        stale: validations of the last stage since the best.
        journal_bytes: length of `recovery.jsonl`.
    """

    step: int = 0
    seconds: float = 0.0
    stepping_seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    streak: int = 0
    stale: int = 0
    validated: int = -1
    validations: int = 0
    validation_seconds: float = 0.0
    best_step: int = 0
    best_file: str = ""
    best: Score | None = None
    first: Score | None = None
    last: Score | None = None
    journal_bytes: int = 0
    stages: list[Annotated[dict[str, Any], Training]] = field(default_factory=list)

    def add_step(self, stage: str, loss: float | None, tokens: int, seconds: float) -> None:
        """Count a step; no loss if it was skipped."""
        if not self.stages or self.stages[-1]["name"] != stage:
            self.stages.append(
                {"name": stage, "steps": 0, "seconds": 0.0, "tokens": 0, "first_loss": loss, "last_loss": loss}
            )
        entry = self.stages[-1]
        entry["steps"] += 1
        entry["seconds"] += seconds
        entry["tokens"] += tokens
        if loss is not None:
            entry["first_loss"] = loss if entry["first_loss"] is None else entry["first_loss"]
            entry["last_loss"] = loss
        self.step += 1
        self.tokens += tokens
        self.stepping_seconds += seconds

    def summary(self, stopped_early: bool, peak: int) -> History:
        """The history of a training that ends now."""
        return History(
            steps=self.step,
            seconds=self.seconds,
            tokens=self.tokens,
            tokens_per_second=self.tokens / self.stepping_seconds if self.stepping_seconds else 0.0,
            skipped=self.skipped,
            best_step=self.best_step,
            best=_known(self.best),
            first=_known(self.first),
            last=_known(self.last),
            stopped_early=stopped_early,
            helped=self.best_step > 0,
            peak_memory_bytes=peak,
            stages=tuple(self.stages),
            validations=self.validations,
            validation_seconds=self.validation_seconds,
        )


def _known(score: Score | None) -> Score | None:
    return None if score == WORST else score


class Journal:
    """`recovery.jsonl`: one line per step and validation.

    Args:
        folder: where it lies.
        keep: bytes of it that belong to the steps already done; what follows is dropped.
        writer: of several processes one writes.
    """

    def __init__(self, folder: Path, keep: int, writer: bool) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        if writer:
            with reported_as_output_errors(folder):
                path = folder / JOURNAL
                self._file = path.open("r+b" if path.exists() else "w+b")
                self._file.truncate(min(keep, path.stat().st_size))
                self._file.seek(0, os.SEEK_END)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; it is with the operating system afterwards, not yet on the disk."""
        if self._file is not None:
            with reported_as_output_errors(self._folder):
                self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                self._file.flush()

    def bytes_written(self) -> int:
        """Its length."""
        return self._file.tell() if self._file is not None else 0

    def close(self) -> None:
        """Nothing more will be written."""
        if self._file is not None:
            self._file.close()


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated at most on a GPU (since its count was reset), else resident at most since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
