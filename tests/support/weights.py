"""A graph that gives its weights back, of every kind that is rounded."""

from __future__ import annotations

import torch
from torch import nn

from slimvlm.export.graphs.graph import Graph, Port

WIDTHS = ((64, 48), (37, 5), (101, 33))  # what a cut leaves is no multiple of a block


class Weights(nn.Module):
    """Each kind of weight, asked for itself: `width` numbers in, `count` rows."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.deep = nn.Linear(width, count), nn.Linear(width, count, bias=False)
        self.table, self.patches = nn.Embedding(count, width), nn.Conv2d(3, count, 2, stride=2)

    def forward(self, unit, places, pixels):
        deep = self.deep(unit[None]).squeeze(0).T
        return (self.flat(unit) - self.flat.bias).T, deep, self.table(places), self.patches(pixels).flatten(1).T

    def graph(self, dtype: torch.dtype) -> Graph:
        """Traced with the unit vectors, so that it gives the weights back."""
        self.to(dtype)
        unit, pixels = torch.eye(self.flat.in_features, dtype=dtype), torch.eye(12, dtype=dtype).view(12, 3, 2, 2)
        given = {"unit": unit, "places": torch.arange(self.flat.out_features), "pixels": pixels}
        ports = tuple(Port(name, sample, {0: name}) for name, sample in given.items())
        return Graph("weights", self.eval(), ports, {name: {} for name in ("flat", "deep", "table", "patches")})
