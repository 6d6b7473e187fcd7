"""What the checks share: the device, a scratch folder, and what earlier checks made for later ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slimvlm.selfcheck.outcome import SkippedError


@dataclass
class Ground:
    """Where the checks take place.

    Attributes:
        device: `cpu` or `cuda:N`.
        folder: everything that is written goes here.
        facts: what the machine and its software are, for the last line.
        made: names of checks that passed; others build on what they left in `folder`.
        job: of `job.py`, once it has begun.
    """

    device: torch.device
    folder: Path
    facts: dict[str, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    job: Any = None  # a `job.Job`: that file imports this one

    @property
    def gpu(self) -> bool:
        """Whether the device is one."""
        return self.device.type == "cuda"

    def need_gpu(self, what: str) -> None:
        """Raises SkippedError on a CPU."""
        if not self.gpu:
            raise SkippedError(f"{what}, and this ran on the CPU")

    def need(self, name: str) -> None:
        """Raises SkippedError if the check that makes what this one reads did not pass."""
        if name not in self.made:
            raise SkippedError(f"needs what the check `{name}` makes")


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 means fp32: cuDNN's convolutions round to TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
