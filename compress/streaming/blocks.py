"""The blocks of a model, one of which at a time is there while it is streamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from slimvlm.compress.models.families import Family
from slimvlm.compress.models.projections import resolve


def blocks_of(model: nn.Module, family: Family) -> list[str]:
    """Their paths, tower by tower: the order in which a forward comes to them."""
    return [
        f"{tower.blocks}.{index}"
        for tower in family.towers
        for index in range(len(resolve(model, tower.blocks, family)))
    ]


STREAMED = "streamed"


def streamed(model: nn.Module) -> bool:
    """Whether the weights of the blocks of `model` are read when they are needed."""
    return STREAMED in model.__dict__


@contextmanager
def held(model: nn.Module, path: str) -> Iterator[None]:
    """The block of a streamed model is there meanwhile."""
    yield
