"""What the teacher said, kept on disk: a small training set is read several times, its teacher need not run again.

A cache is a convenience: a full disk, a spent budget or a damaged file never stop a run, they only cost teacher time.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor

from slimvlm.compress.errors import OutputError
from slimvlm.compress.files.writing import load_tensors, save_tensors

SUMS = "crc32"
SUFFIX = ".safetensors"
HEADER_BYTES = 256  # per tensor, more than a file's header takes


class TeacherCache:
    """Outputs of one teacher by batch, safetensors files in one folder.

    A batch may have several files: a stage that needs more than was kept adds what is missing, one that needs less
    reads its part. Several processes may share the folder; each counts what it writes itself and what was there before.

    Args:
        folder: made if it is not there; for one teacher only (its identity belongs into the folder's name or the keys).
        budget_bytes: nothing is written beyond this size of the folder.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self.folder, self.budget_bytes = folder, budget_bytes
        self._writes = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.size_bytes = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
        except OSError as error:
            self.size_bytes = 0
            self._stop(error.strerror or str(error))

    def outputs(self, key: str, names: Collection[str], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The named outputs for the batch `key`, from the cache or computed and kept."""
        found = self.get(key, names)
        if found is None:
            found = compute()
            self.put(key, found)
        return found

    def get(self, key: str, names: Collection[str]) -> dict[str, Tensor] | None:
        """The named outputs for the batch `key`, on the CPU; None if one is missing or damaged.

        Args:
            key: what the batch is made of (see `batch_key`); with the folder it identifies teacher and inputs.
        """
        found: dict[str, Tensor] = {}
        for path in self._files(key):
            if wanted := [name for name in names if name not in found]:
                found |= self._read(path, wanted)
        return found if all(name in found for name in names) else None

    def put(self, key: str, outputs: Mapping[str, Tensor]) -> bool:
        """Keep outputs for the batch `key`, those that are not there yet; whether they are there now.

        Files are written aside and renamed, so a killed process leaves none that is cut off.
        """
        there = {name for path in self._files(key) for name in self._names(path)}
        new = {name: value.detach().cpu().contiguous() for name, value in outputs.items() if name not in there}
        if not new:
            return True
        if not self._writes:
            return False
        size = sum(value.nbytes + HEADER_BYTES for value in new.values())
        if self.size_bytes + size > self.budget_bytes:
            self._stop(f"its budget of {self.budget_bytes} bytes is spent")
            return False
        path = self._path(key, len(list(self._files(key))))
        try:
            save_tensors(path, new, {SUMS: {name: _sum(value) for name, value in new.items()}})
            self.size_bytes += path.stat().st_size
        except (OSError, OutputError) as error:
            self._stop(str(error))
            return False
        return True

    def _path(self, key: str, number: int) -> Path:
        return self.folder / f"{key}.{number}{SUFFIX}"

    def _files(self, key: str) -> Iterator[Path]:
        return takewhile(Path.exists, (self._path(key, number) for number in count()))

    def _names(self, path: Path) -> list[str]:
        with suppress(KeyError, ValueError):
            return list(load_tensors(path, ())[1][SUMS])
        return []

    def _read(self, path: Path, names: Collection[str]) -> dict[str, Tensor]:
        """Those of the named outputs that this file holds; none, and the file is gone, if it is damaged."""
        try:
            read, facts = load_tensors(path, names)
            if all(_sum(value) == facts[SUMS][name] for name, value in read.items()):
                return read
        except (KeyError, TypeError, ValueError):
            pass
        path.unlink(missing_ok=True)
        return {}

    def _stop(self, why: str) -> None:
        self._writes = False
        warnings.warn(f"the cache {self.folder} takes no more of the teacher's outputs: {why}", stacklevel=3)


def batch_key(*parts: str) -> str:
    """A file name for a batch, from what identifies it: teacher, samples in their order, how they are collated."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _sum(value: Tensor) -> int:
    """Checksum of a tensor's bytes; safetensors notices files that are cut off, not bytes that changed."""
    return zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data)
