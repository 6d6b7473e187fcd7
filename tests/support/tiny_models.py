"""Tiny random models of every supported family, built in-process from real transformers configs.

Grouped-query attention is real wherever the family has it: 4 query heads on 2 key-value heads, so that both
attention units (whole KV group, query slot) can be cut. Weights are seeded; a second call gives the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from tiny.families import FACTORIES, MIXED
from tiny.joins import COVERING, tiny_pair
from tiny.sizes import IMAGE_TOKEN, TEXT, VISION, VOCAB

from slimvlm.compress.models.experts import take_apart
from slimvlm.compress.models.families import find_family

EVERY = {**FACTORIES, **MIXED}
__all__ = [
    "COVERING",
    "EVERY",
    "FACTORIES",
    "IMAGE_TOKEN",
    "MIXED",
    "TEXT",
    "VISION",
    "VOCAB",
    "Tiny",
    "add_noise",
    "reading",
    "tiny_model",
]


@dataclass(frozen=True)
class Tiny:
    """A tiny model, and a function giving a batch (with labels) of `batch` examples for its forward."""

    model: torch.nn.Module
    inputs: Callable[[int], dict[str, torch.Tensor]]


def tiny_model(name: str, attention: str = "eager") -> Tiny:
    """A seeded tiny model of a family, in eval mode, fp32; norms and biases have noise: zeros hide bugs."""
    built, state = _built(name, attention)
    torch.set_rng_state(state)  # as if it had just been built
    return Tiny(copy.deepcopy(built.model), built.inputs)


@cache
def _built(name: str, attention: str) -> tuple[Tiny, torch.Tensor]:
    """The model to copy, which takes half the time, and the state in which it leaves the generator."""
    torch.manual_seed(0)
    model, inputs = EVERY[name]() if name in EVERY else tiny_pair(*COVERING[name])
    add_noise(model)
    if attention != "sdpa" or all(getattr(module, "_supports_sdpa", True) for module in model.modules()):
        model.set_attn_implementation(attention)
    take_apart(model, find_family(model.config))
    return Tiny(model.eval(), inputs), torch.get_rng_state()


@torch.no_grad()
def add_noise(model: torch.nn.Module) -> None:
    """Random weights, and random biases and norms, by torch's generator."""
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            parameter.add_(0.1 * torch.randn(parameter.shape))
        else:
            parameter.copy_(torch.randn(parameter.shape) * (0.5 / parameter.shape[-1] ** 0.5))


def reading(name: str, states: int | tuple[int, ...]) -> Tiny:
    """The tiny model of a family, built to read these hidden states of its three vision blocks."""
    tiny = tiny_model(name, "sdpa")
    config = tiny.model.config
    config.vision_feature_layer = states if isinstance(states, int) else list(states)
    torch.manual_seed(0)
    return Tiny(type(tiny.model)(config).eval(), tiny.inputs)
