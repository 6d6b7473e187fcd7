"""Config fields with which the unmodified class builds narrower parts: found by building it half as wide."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any  # configs and lists of blocks of transformers

import torch
from torch import nn
from transformers import PreTrainedModel

from slimvlm.compress.models.discovery.blocks import Stack
from slimvlm.compress.models.families import Attention, Mlp
from slimvlm.compress.models.families.parts import GQA_STOCK

Part = Attention | Mlp
Shapes = dict[str, tuple[int, ...]]
Fields = Mapping[str, Any]
Candidate = tuple[Part, Mapping[str, float]]  # a part with its fields, and their values for half of it


def sized(model: PreTrainedModel, stack: Stack, part: Part) -> Part:
    """`part` with its `stock`, where the class of `model` builds all blocks of `stack` with half of its units, and the
    rest of the model as it is, once some fields of their config are halved; else as it is.
    """
    wanted, config = _halved(model, stack, part), getattr(model.config, stack.section).to_dict()
    if wanted is None:
        return part
    if isinstance(part, Attention):
        candidates = _head_fields(model, stack, part, config)
    else:
        candidates = _width_fields(model, stack, part, config)
    for found, values in candidates:
        other = copy.deepcopy(model.config)
        for name, value in values.items():
            setattr(getattr(other, stack.section), name, value)
        try:
            with torch.device("meta"):
                built = _shapes(type(model)(other))
        except Exception:  # somebody else's class, given a config on suspicion
            continue
        if built == wanted:
            return found
    return part


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}


def _halved(model: nn.Module, stack: Stack, part: Part) -> Shapes | None:
    """The shapes of all parameters with half of the part's units in every block that has it; None: it has no half."""
    shapes = _shapes(model)
    inside = f"{part.module}." if isinstance(part, Attention) else ""
    narrowed = [(f"{inside}{row}.{kind}", 0) for row in part.rows for kind in ("weight", "bias")]
    for block, _ in model.get_submodule(stack.path).named_children():
        for name, dimension in (*narrowed, (f"{part.exit}.weight", 1)):
            shape = list(shapes.get(path := f"{stack.path}.{block}.{name}", ()))
            if not shape:
                continue
            if shape[dimension] % 2:
                return None
            shape[dimension] //= 2
            shapes[path] = tuple(shape)
    return shapes


def _first(model: nn.Module, stack: Stack, path: str) -> Any:
    """The module `path` of the first block that has it."""
    blocks = model.get_submodule(stack.path).children()
    return next(found for block in blocks for name, found in block.named_modules() if name == path)


def _head_fields(model: nn.Module, stack: Stack, part: Attention, config: Fields) -> Iterator[Candidate]:
    """Numbers of heads and the size of a head."""
    size = getattr(_first(model, stack, part.module), part.head_dim, None) if part.head_dim else None
    counts = {name: config.get(name) for name, fact in GQA_STOCK if fact != "head_dim"}
    halves = {name: one // 2 for name, one in counts.items() if type(one) is int and one % 2 == 0}
    if len(halves) == len(counts) and size is not None and not part.norms:
        yield replace(part, stock=GQA_STOCK), {**halves, "head_dim": size}


def _width_fields(model: nn.Module, stack: Stack, part: Mlp, config: Fields) -> Iterator[Candidate]:
    """A width, or how many times as wide as the block it is."""
    rows, columns = _first(model, stack, part.output).weight.shape
    for name, value in config.items():
        if type(value) in (int, float) and (half := type(value)(value / 2)) * 2 == value:
            for width, ratio in ((value, False), (value * rows, True)):
                if width == columns:
                    yield replace(part, stock=name, ratio=ratio), {name: half}
