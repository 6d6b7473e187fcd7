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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.streaming.lazy import Lazy, read
from slimvlm.compress.models.streaming.scratch import Scratch, require_scratch
from slimvlm.compress.models.streaming.shards import Shard

HELD = 2**30


@dataclass(frozen=True, slots=True)
class Holding:
    """What of a streamed model is in memory beside two blocks.

    Attributes:
        bound: bytes that these and what is outside of the blocks must fit into; None: any.
        tables: the embeddings of tokens and the head too, for good.
    """

    bound: int | None = None
    tables: bool = True


WITH_TABLES = Holding()


class StreamedWeights:
    """Where the weights of a streamed model are.

    Args:
        shards: its files.
        bound: bytes of what is kept to be put in the place of weights and is held in memory; what is more is written
            into files of the system's folder for temporary ones (TMPDIR), which go with the model.
    """

    def __init__(self, shards: Sequence[Shard], bound: int = HELD) -> None:
        self.shards, self.scratch = tuple(shards), Scratch(bound)

    def put(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Give a parameter other values, of its shape; they are kept in its dtype.

        Raises:
            OutputError: the disk is full.
        """
        if isinstance(parameter, Lazy):
            same = values.dtype == parameter.dtype
            parameter.source = self.scratch.keep(values if same else values.to(parameter.dtype)).source
            return
        with torch.no_grad():
            parameter.copy_(values)

    def require_room(self, parameters: Iterable[nn.Parameter]) -> None:
        """Refuse to begin what gives parameters other values that have no room.

        Raises:
            OutputError: what is more than may be held in memory does not fit where files for a time are (TMPDIR).
        """
        wanted = sum(parameter.nbytes for parameter in parameters if isinstance(parameter, Lazy))
        require_scratch(wanted + self.scratch.held - self.scratch.bound)

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


def require_memory(model: nn.Module, blocks: Sequence[str], free: int, read: Sequence[str] = ()) -> None:
    """Refuse a model of which not even two blocks, the one that computes and the one that is read, have room.

    Args:
        blocks: paths of the lists of blocks.
        free: bytes.
        read: paths of what else is read when it is needed.

    Raises:
        UnsuitableOptionError: there is no room for them beside what is outside of the blocks.
    """
    sizes = {
        f"{path}.{name}": sum(parameter.nbytes for parameter in block.parameters())
        for path in blocks
        for name, block in model.get_submodule(path).named_children()
    }
    passing = {parameter for path in read for parameter in model.get_submodule(path).parameters()}
    outside = sum(parameter.nbytes for parameter in {*model.parameters()} - passing) - sum(sizes.values())
    largest = max(sizes, key=sizes.__getitem__)
    if outside + 2 * sizes[largest] > free:
        raise UnsuitableOptionError(
            f"two blocks of {sizes[largest] / 1e9:.3g} GB ({largest}) and {outside / 1e9:.3g} GB outside of the blocks "
            f"do not fit into {free / 1e9:.3g} GB of memory; give more memory, or take a smaller model"
        )


def tables_of(model: Any) -> list[str]:
    """Paths of the embeddings of tokens and of the head of a model that answers: its largest weights. Without one that
    has its first weight, which says where the model computes.
    """
    if not model.can_generate():
        return []
    first, ends = next(model.parameters()), (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        path
        for path, module in model.named_modules()
        if any(module is end for end in ends) and all(weight is not first for weight in module.parameters())
    ]


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
