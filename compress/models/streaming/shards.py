"""The files of a checkpoint, of which a tensor at a time is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from slimvlm.compress.errors import CheckpointError, foreign
from slimvlm.compress.models.streaming.lazy import Lazy, Source

AGAIN = "copy or download it again"
KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
KINDS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool}
KINDS |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
KINDS |= {f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)}


class Shard:
    """A safetensors file, of which a tensor at a time is read into memory of its own.

    Raises:
        CheckpointError: it is damaged; also when it is read, or has changed since it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checked = path, set[str]()
        self._stamp, self._lock = _stamp(path), Lock()
        with foreign(f"{path} is damaged", AGAIN):
            self._file = safe_open(path, "pt", backend="pread")

    def lazies(self) -> dict[str, Lazy]:
        """All its tensors by name."""
        found = {}
        with foreign(f"{self.path} is damaged", AGAIN):
            for name in self._file.keys():  # noqa: SIM118 (no mapping)
                view = self._file.get_slice(name)
                like = torch.empty(view.get_shape(), dtype=KINDS[view.get_dtype()], device="meta")
                found[name] = Lazy.of(Stored(self, name), like)
        return found

    def tensor(self, name: str) -> Tensor:
        """Of the file as it was opened, every value a number."""
        self.check_unchanged()
        with foreign(f"{self.path} is damaged", AGAIN), self._lock:
            tensor: Tensor = self._file.get_tensor(name)
        if name not in self.checked and tensor.is_floating_point() and tensor.numel():
            if not torch.stack(torch.aminmax(tensor)).isfinite().all():
                raise CheckpointError(
                    f"{self.path}: {name} holds values that are not finite; nothing can be computed with them. Copy or "
                    "download the checkpoint again, or take an earlier state of its training"
                )
            self.checked.add(name)
        return tensor

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file is not the one that was opened."""
        if _stamp(self.path) != self._stamp:
            raise CheckpointError(
                f"{self.path} was changed or replaced while it was read; start again, and leave it alone until the end"
            )


@dataclass(frozen=True, eq=False)
class Stored(Source):
    """A tensor of a shard."""

    shard: Shard
    name: str

    def make(self, values: Sequence[Any]) -> Tensor:
        return self.shard.tensor(self.name)


def _stamp(path: Path) -> tuple[int, int, int]:
    with foreign(f"{path} cannot be read", AGAIN):
        found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino
