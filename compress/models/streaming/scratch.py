"""Tensors that are put away until they are needed: in memory up to a bound, what is more in files."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import finalize

import torch
from torch import Tensor

from slimvlm.compress.files.writing import save_tensors
from slimvlm.compress.models.streaming.lazy import Held, Lazy, Source
from slimvlm.compress.models.streaming.shards import Shard, Stored


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
            path = Path(self._folder.name, f"{self.written}.safetensors")
            save_tensors(path, {"values": values.contiguous()}, {})
            shard = Shard(path)
            shard.checked.add("values")  # they need not be numbers
            source = Stored(shard, "values")
            finalize(source, path.unlink, missing_ok=True)
        return Lazy.of(source, torch.empty_like(values, device="meta"))

    def _give_up(self, freed: int) -> None:
        self.held -= freed
