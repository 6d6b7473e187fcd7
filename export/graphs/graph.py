"""A graph to write: a module, sample inputs, and which of their axes vary; the cache as its ports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
PATCHES = "num_patches"
ROWS = {0: BATCH, 1: SEQUENCE}  # of what has a row per token
Model = Any  # of transformers, a part of it or its processor: each class names what is inside in its own way
SAMPLE_BATCH, SAMPLE_SEQUENCE, SAMPLE_PAST = 2, 3, 4  # all different and none 0 or 1: what is equal is taken for fixed


@dataclass(frozen=True, slots=True)
class Port:
    """One input: a tensor to trace with, and which of its axes vary, by name."""

    name: str
    sample: Tensor
    axes: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Graph:
    """One file to be: `module(*samples of inputs)` gives the `outputs` in order; `outputs` name their varying axes.

    `longest` and `unit` bound an axis, by its name: at most this many, a multiple of this many.
    """

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: Mapping[str, Mapping[int, str]]
    longest: Mapping[str, int] = field(default_factory=dict)
    unit: Mapping[str, int] = field(default_factory=dict)

    @property
    def samples(self) -> tuple[Tensor, ...]:
        """The tensors to trace with."""
        return tuple(port.sample for port in self.inputs)


def filled_cache(past: Sequence[Tensor]) -> DynamicCache:
    """A cache that holds keys and values [B, K, P, D], given as key, value of layer 0, then of layer 1, ..."""
    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def cached_tensors(cache: DynamicCache) -> list[Tensor]:
    """Keys and values as `filled_cache` takes them."""
    layers: list[Any] = cache.layers  # transformers' base class of them has no keys
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def present(past: Sequence[Port], length: str) -> dict[str, Mapping[int, str]]:
    """The outputs that become the inputs `past` of the next step."""
    return {port.name.replace("past_key_values", "present"): {0: BATCH, 2: length} for port in past}


def cache_ports(sizes: Sequence[tuple[int, int]], name: str, length: str, dtype: torch.dtype) -> list[Port]:
    """Ports of keys and values; `sizes` are (K, D) of every layer, `name` holds `{layer}` and `{part}`."""
    generator = torch.Generator().manual_seed(0)
    return [
        Port(
            name.format(layer=layer, part=part),
            torch.randn(SAMPLE_BATCH, heads, SAMPLE_PAST, width, generator=generator).to(dtype),
            {0: BATCH, 2: length},
        )
        for layer, (heads, width) in enumerate(sizes)
        for part in ("key", "value")
    ]
