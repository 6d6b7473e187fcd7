"""What happened in a training: the facts so far, and the lines of `recovery.jsonl`."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

import torch

from slimvlm.compress.files.writing import reported_as_output_errors
from slimvlm.compress.recovery.training.choice import Score, Validation, as_good_as, least_of_both
from slimvlm.compress.run_record import Training
from slimvlm.compress.runs import JOURNAL

TO_GO_ON = ("stepping_seconds", "streak", "stale", "validated", "least", "first_least", "best_file", "journal_bytes")


@dataclass
class History:
    """What a training did so far; saved with every checkpoint.

    Attributes:
        steps: optimiser steps done, skipped ones included; in the end all of them unless it `stopped_early`.
        seconds: wall-clock time, validations and checkpoints included, over all resumed parts.
        stepping_seconds: of them those of the steps alone.
        tokens: input tokens without padding, over all processes.
        skipped: steps left out because loss or gradient was not finite; `streak` of them in a row.
        best_step: whose weights are kept, in `best_file`; 0: the starting ones.
        best, first, last: validation (score, -loss) at `best_step`, before training, and at the end; None without one,
            or if it was no number.
        peak_memory_bytes: of this process: resident memory on a CPU (since it started), allocated on a GPU.
        stages: of each stage that was reached.
        validations, validation_seconds: how many there were (before, during and at the end), and how long they took.
        validated: step of the last one.
        stale: validations of the last stage since the last gain.
        least, first_least: what a state must reach not to be worse than any before it, or than the starting one.
        journal_bytes: length of `recovery.jsonl`.
    """

    steps: int = 0
    seconds: float = 0.0
    stepping_seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    streak: int = 0
    best_step: int = 0
    best_file: str = ""
    best: Score | None = None
    first: Score | None = None
    last: Score | None = None
    stopped_early: bool = False
    peak_memory_bytes: int = 0
    stages: list[Training] = field(default_factory=list)
    validations: int = 0
    validation_seconds: float = 0.0
    validated: int = -1
    stale: int = 0
    least: Score | None = None
    first_least: Score | None = None
    journal_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Over the time of steps alone."""
        return self.tokens / self.stepping_seconds if self.stepping_seconds else 0.0

    @property
    def helped(self) -> bool:
        """Whether a trained state was kept; if not, the student has its starting weights again."""
        return self.best_step > 0

    def to_dict(self) -> dict[str, object]:
        """What the record of a run says."""
        facts = {name: value for name, value in asdict(self).items() if name not in TO_GO_ON}
        return {**facts, "tokens_per_second": self.tokens_per_second, "helped": self.helped}

    def after(self, first: History) -> History:
        """Of both, this training having gone on from what another one gave, whose states count as this one's first."""
        sums = ("steps", "seconds", "stepping_seconds", "tokens", "skipped", "validations", "validation_seconds")
        return replace(
            self,
            **{name: getattr(first, name) + getattr(self, name) for name in sums},
            best_step=first.steps + self.best_step,
            first=first.first,
            first_least=first.first_least,
            peak_memory_bytes=max(first.peak_memory_bytes, self.peak_memory_bytes),
            stages=[*first.stages, *self.stages],
        )

    def add_validation(self, found: Validation | None, last_stage: bool) -> bool:
        """Note a validation of the student as it is, None if it was no number; whether this state is to be kept.

        Args:
            last_stage: earlier ones teach what the score does not show yet.
        """
        score, least = found or (None, None)
        keep = self.validations == 0 or (score is not None and as_good_as(score, self.least))
        if self.validations == 0:
            self.first, self.first_least = score, least
        if keep:
            self.best, self.best_step = score, self.steps
        before, self.last = self.least, score
        if least is not None:
            self.least = least_of_both(self.least, least)
        self.stale = self.stale + last_stage if self.least == before else 0
        self.validated = self.steps
        self.validations += 1
        return keep

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
        self.steps += 1
        self.tokens += tokens
        self.stepping_seconds += seconds


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

    def write(self, line: Mapping[str, object]) -> None:
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
