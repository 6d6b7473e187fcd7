"""Tensors that are put away until they are needed: in memory up to a bound, what is more in files."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, c_char
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any
from weakref import finalize

import torch
from torch import Tensor

from slimvlm.compress.errors import foreign
from slimvlm.compress.files.folders import require_room
from slimvlm.compress.files.writing import reported_as_output_errors
from slimvlm.compress.models.streaming.lazy import Held, Lazy, Source


def require_scratch(wanted: int) -> None:
    """Refuse to begin what puts away more bytes than have room.

    Raises:
        OutputError: so it is.
    """
    require_room(Path(gettempdir()), wanted, "name a folder on another disk by TMPDIR")


class Scratch:
    """Where they are; files are in the system's folder for temporary ones (TMPDIR) and go with this.

    Args:
        bound: bytes in memory.
    """

    def __init__(self, bound: int) -> None:
        self.bound, self.held, self.written = bound, 0, 0
        self._folder: TemporaryDirectory[str] | None = None

    def keep(self, values: Tensor) -> Lazy:
        """What stands for these values as long as somebody has it; whoever had them is not to change them.

        Raises:
            OutputError: the disk is full.
        """
        if isinstance(values, Lazy):
            return values
        values = values.detach().to("cpu")
        source: Source = Held(values)
        if self.held + values.nbytes <= self.bound:
            self.held += values.nbytes
            finalize(source, self._give_up, values.nbytes)
        else:
            self._folder = self._folder or TemporaryDirectory(prefix="slimvlm-")
            self.written += 1
            source = _File(Path(self._folder.name, str(self.written)), values)
            finalize(source, source.path.unlink, missing_ok=True)
        return Lazy.of(source, torch.empty_like(values, device="meta"))

    def _give_up(self, freed: int) -> None:
        self.held -= freed


class _File(Source):
    """Values that are written to a file of their own, which nobody else reads and no failure of the system outlives:
    it is open no longer than it is read, there are many.
    """

    def __init__(self, path: Path, values: Tensor) -> None:
        self.path, self.shape, self.dtype = path, values.shape, values.dtype
        values = values.contiguous()
        with reported_as_output_errors(path), path.open("wb") as file:
            file.write(_memory(values))

    def make(self, values: Sequence[Any]) -> Tensor:
        made = torch.empty(self.shape, dtype=self.dtype)
        advice = "leave the folder for temporary files alone, and start again"
        with foreign(f"{self.path} is gone or damaged", advice), self.path.open("rb") as file:
            if file.readinto(_memory(made)) != made.nbytes:
                raise ValueError("it is too short")
        return made


def _memory(tensor: Tensor) -> Array[c_char]:
    """Of a contiguous tensor, as long as that is there; as an array of numpy's it could be given up never more."""
    return (c_char * tensor.nbytes).from_address(tensor.data_ptr())
