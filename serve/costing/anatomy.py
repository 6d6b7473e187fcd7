"""What of a model costs time and room, read from its config: no weights are read and none are run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimvlm.compress.models.checkpoint import build_meta
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import count_parameters, find_groups, weigh
from slimvlm.compress.models.projections import resolve
from slimvlm.compress.streaming.room import widths_of
from slimvlm.serve.judging.roofline import Shapes
from slimvlm.serve.judging.shapes import model_shapes

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SIDE = 448  # pixels of an image, where the config names no size


@dataclass(frozen=True, slots=True)
class BlockKind:
    """The blocks of one tower, of which the largest counts.

    Attributes:
        sees: `patch`, or `text` for the tokens of a language model.
        parameters: of one; `macs`: weights that each of its tokens meets.
        width: of the states that go from one to the next; 0 where there is no projection that could be cut.
        attention: H D of one.
    """

    tower: str
    sees: str
    blocks: int
    parameters: int
    macs: int
    width: int
    attention: int


@dataclass(frozen=True, slots=True)
class Projection:
    """An output projection [width, inner] that a cut takes columns from, and which tokens it sees."""

    sees: str
    inner: int
    width: int


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What of a model costs time and room.

    Attributes:
        dtype: of the stored weights, `fp32`, `bf16` or `fp16`; `itemsize`: their bytes.
        side: of an image in pixels.
        largest: weights of the largest tensor.
    """

    shapes: Shapes
    dtype: str
    itemsize: int
    side: int
    blocks: tuple[BlockKind, ...]
    projections: tuple[Projection, ...]
    largest: int

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.shapes.parameters

    @property
    def in_blocks(self) -> int:
        """Weights in the blocks of the towers; the others stay in memory when blocks are streamed."""
        return sum(kind.blocks * kind.parameters for kind in self.blocks)


def anatomy_of(name: str | os.PathLike[str], side: int | None = None, trust_remote_code: bool = False) -> Anatomy:
    """Of the checkpoint `name` (a folder or a hub name).

    Args:
        side: of the images, in pixels; default: what the config says, or 448.

    Raises:
        CheckpointError, UnsupportedModelError: as `build_meta`.
    """
    model, family = build_meta(name, trust_remote_code)
    return model_anatomy(model, family, side)


def model_anatomy(model: Any, family: Family, side: int | None = None) -> Anatomy:
    """Of `model` (the meta device is enough)."""
    stored = model.config.dtype or model.dtype
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    vision: Any = next((tower for tower in family.towers if tower.modality == "vision"), family.towers[0])
    named = getattr(getattr(model.config, vision.config, None), "image_size", None)
    projections = tuple(_projections(model, family))
    return Anatomy(
        shapes=model_shapes(model, family),
        dtype=NAMES.get(stored, "fp32"),
        itemsize=stored.itemsize,
        side=side or (max(named) if isinstance(named, (list, tuple)) else named) or SIDE,
        blocks=tuple(_blocks(model, family)),
        projections=projections,
        largest=max(math.prod(weight.shape) for weight in model.parameters()),
    )


def _sees(modality: str) -> str:
    return "patch" if modality == "vision" else "text"


def _projections(model: nn.Module, family: Family) -> list[Projection]:
    """Each tensor once: the experts of a group lie in one."""
    found: dict[str, Projection] = {}
    for group in find_groups(model, family):
        for member in group.members:
            if member.dim == 1 and not member.norm:
                width, inner = resolve(model, member.path, family).weight.shape[-2:]
                found[member.path] = Projection(_sees(group.home.modality), inner, width)
    return list(found.values())


def _blocks(model: nn.Module, family: Family) -> list[BlockKind]:
    groups, widths, found = find_groups(model, family, dead=True), widths_of(model, family), []
    for tower in family.towers:
        blocks = [module for module in resolve(model, tower.blocks, family) if count_parameters(module)]
        own = [group for group in groups if group.tower == tower.name]
        parameters, macs = max(weigh(tower, [block]) for block in blocks)
        found.append(
            BlockKind(
                tower=tower.name,
                sees=_sees(tower.modality),
                blocks=len(blocks),
                parameters=parameters,
                macs=macs,
                width=widths.get(tower.name, 0),
                attention=max((group.size * group.head_dim for group in own if group.kind == "attention"), default=0),
            )
        )
    return found
