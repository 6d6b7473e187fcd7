"""The weights of a checkpoint that does not fit into memory: a model whose blocks are read when they are needed.

A streamed model is transformers' own, built and checked by `from_pretrained` of lazy tensors (see lazy): everything
outside of the towers' blocks is in memory, and the parameters of the blocks are lazy. Renamed, tied, stacked and split
weights are so what transformers makes of them, and a cut or a renumbered block is read as it is now.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any
from weakref import finalize

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.compress.errors import CheckpointError, UnsuitableOptionError, foreign
from slimvlm.compress.files.writing import save_tensors
from slimvlm.compress.models.streaming.lazy import Held, Lazy, Source, read

HELD = 2**30
AGAIN = "copy or download it again"
KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
KINDS |= {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool, "U8": torch.uint8}


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


class StreamedWeights:
    """Where the weights of a streamed model are.

    Args:
        shards: its files.
        bound: bytes of weights that were put in the place of others and are held in memory; what is more is written
            into files of the system's folder for temporary ones (TMPDIR), which go with the model.
    """

    def __init__(self, shards: Sequence[Shard], bound: int = HELD) -> None:
        self.shards, self.bound, self.held = tuple(shards), bound, 0
        self._scratch: TemporaryDirectory[str] | None = None
        self._written = 0

    def put(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Give a parameter other values, of its shape; they are kept in its dtype.

        Raises:
            OutputError: the disk is full.
        """
        if isinstance(parameter, Lazy):
            parameter.source = self.keep(values.to(parameter.dtype)).source
            return
        with torch.no_grad():
            parameter.copy_(values)

    def keep(self, values: Tensor) -> Lazy:
        """What stands for these values as long as somebody has it.

        Raises:
            OutputError: the disk is full.
        """
        if isinstance(values, Lazy):
            return values
        values = values.detach().to("cpu", copy=True)
        source: Source = Held(values)
        if self.held + values.nbytes <= self.bound:
            self.held += values.nbytes
            finalize(source, self._give_up, values.nbytes)
        else:
            self._scratch = self._scratch or TemporaryDirectory(prefix="slimvlm-weights-")
            self._written += 1
            path = Path(self._scratch.name, f"{self._written}.safetensors")
            save_tensors(path, {"values": values}, {})
            source = Stored(Shard(path), "values")
            finalize(source, path.unlink, missing_ok=True)
        return Lazy.of(source, torch.empty_like(values, device="meta"))

    def _give_up(self, freed: int) -> None:
        self.held -= freed

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a shard was changed since it was opened; also every reading finds that."""
        for shard in self.shards:
            shard.check_unchanged()


def streamed(model: nn.Module) -> StreamedWeights | None:
    """What the weights of `model` are read from; None: they are in memory."""
    return model.__dict__.get("streamed_weights")


def open_streamed(model_class: Any, folder: Path, files: Sequence[Path], options: dict[str, Any]) -> tuple[Any, Any]:
    """(model, what is missing) that `from_pretrained` of the class gives for a folder with these weight files, its
    parameters lazy; buffers are in memory. `options`: of `from_pretrained`.
    """
    shards = [Shard(path) for path in files]
    weights = {name: lazy for shard in shards for name, lazy in shard.lazies().items()}
    model, info = model_class.from_pretrained(None, state_dict=weights, device_map={"": "meta"}, **options)
    model.config.name_or_path = model.name_or_path = os.fspath(folder)
    if model.can_generate():
        asked = dict.fromkeys(("cache_dir", "proxies", "token", "revision"))
        model.adjust_generation_fn(
            None, False, False, folder, **asked, force_download=False, local_files_only=True, subfolder="",
            trust_remote_code=False,
        )  # fmt: skip
    _fill_buffers(model)
    model.__dict__["streamed_weights"] = StreamedWeights(shards)
    return model, info


def require_memory(model: nn.Module, blocks: Sequence[str], free: int) -> None:
    """Refuse a model of which not even two blocks, the one that computes and the one that is read, have room.

    Args:
        blocks: paths of the lists of blocks.
        free: bytes.

    Raises:
        UnsuitableOptionError: there is no room for them beside what is outside of the blocks.
    """
    sizes = {
        f"{path}.{name}": sum(parameter.nbytes for parameter in block.parameters())
        for path in blocks
        for name, block in model.get_submodule(path).named_children()
    }
    outside = sum(parameter.nbytes for parameter in model.parameters()) - sum(sizes.values())
    largest = max(sizes, key=sizes.__getitem__)
    if outside + 2 * sizes[largest] > free:
        raise UnsuitableOptionError(
            f"two blocks of {sizes[largest] / 1e9:.3g} GB ({largest}) and {outside / 1e9:.3g} GB outside of the blocks "
            f"do not fit into {free / 1e9:.3g} GB of memory; give more memory, or take a smaller model"
        )


def make_resident(model: nn.Module, blocks: Iterable[str]) -> None:
    """Read, for good, whatever is not inside of `blocks` (prefixes of names)."""
    inside = tuple(f"{path}." for path in blocks)
    owners: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, Lazy) and not f"{path}.{name}".startswith(inside):
                if id(parameter) not in owners:
                    owners[id(parameter)] = nn.Parameter(read([parameter])[0], parameter.requires_grad)
                module._parameters[name] = owners[id(parameter)]


def _fill_buffers(model: PreTrainedModel) -> None:
    """Those that are stored are read, the others are what the class makes of them."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        made = type(model)._from_config(model.config, dtype=model.dtype)
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Lazy):
                module._buffers[name] = read([buffer])[0]
            elif buffer is not None and buffer.is_meta:
                module._buffers[name] = made.get_submodule(path)._buffers[name]


def _stamp(path: Path) -> tuple[int, int, int]:
    with foreign(f"{path} cannot be read", AGAIN):
        found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino
