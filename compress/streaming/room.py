"""Whether what forwards put away while they wait has room, asked before they begin: by shapes, no weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any  # a model of transformers'

import torch
from torch import Tensor, nn

from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.projections import resolve
from slimvlm.compress.streaming import pages

BESIDE = 2  # states of a tower, about, that are there before its first block and after its last one
TAUGHT = 4 * 2**30  # bytes of the batches on their way through a streamed teacher, besides the held-out ones
PATCH = 14  # pixels of a side, where the config names none


def widths_of(model: nn.Module, family: Family) -> dict[str, int]:
    """Tower -> width of the states that go from one of its blocks to the next; none where nothing could be cut."""
    found: dict[str, int] = {}
    for group in find_groups(model, family, dead=True):
        if group.members:
            width = resolve(model, group.members[-1].path, family).weight.shape[-2]
            found[group.tower] = max(width, found.get(group.tower, 0))
    return found


def waiting_bytes(model: Any, family: Family, batch: Mapping[str, Tensor], learning: bool, itemsize: int) -> int:
    """About what can be put away of a forward that waits at blocks: what it was asked, and the states that it is at;
    with `learning`, those that every block has read.

    Args:
        model: may be on the meta device.
        itemsize: bytes of a value that is computed.
    """
    widths, sizes = widths_of(model, family), []
    for tower in family.towers:
        tokens = _patches(model, batch) if tower.modality == "vision" else batch["input_ids"].numel()
        state = tokens * widths.get(tower.name, 0) * itemsize
        held = BESIDE + (len(resolve(model, tower.blocks, family)) if learning else 1)
        sizes.append(held * state if state >= pages.LEAST else 0)
    asked = (value.numel() * (itemsize if value.is_floating_point() else value.itemsize) for value in batch.values())
    return sum(size for size in asked if size >= pages.LEAST) + (sum(sizes) if learning else max(sizes))


def refitted_bytes(model: nn.Module, family: Family, itemsize: int) -> int:
    """At most what a refit gives: of every output projection that columns leave, once."""
    sizes: dict[str, int] = {
        member.path: resolve(model, member.path, family).weight.numel()
        for group in find_groups(model, family)
        for member in group.members
        if member.dim == 1 and not member.norm
    }
    return itemsize * sum(sizes.values())


def _patches(model: Any, batch: Mapping[str, Tensor]) -> int:
    pixels = batch.get("pixel_values", torch.empty(0, 1))
    if pixels.ndim < 4:  # they come as rows
        return pixels.numel() // pixels.shape[-1]
    size = getattr(getattr(model.config, "vision_config", None), "patch_size", None) or PATCH
    side = size if isinstance(size, int) else max(size)
    return pixels[..., 0, 0, 0].numel() * math.prod(pixels.shape[-2:]) // side**2
