"""What is won when units leave: the costs by name, and the measured times that a ranking may go by. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from slimvlm.compress.allocate.bundles import Line
    from slimvlm.compress.allocate.facts import Facts
    from slimvlm.compress.allocate.pool import Floats


DEAREST = 1e3  # so many times what its parameters win on average a unit costs that wins no time


@dataclass(frozen=True)
class Total:
    """What a model costs: the whole, the blocks of each tower, the prunable part of each kind, the dead blocks of each
    tower that has some (counted in the whole and in their tower).
    """

    whole: float
    towers: Mapping[str, float]
    kinds: Mapping[str, float]
    dead: Mapping[str, float]


@dataclass(frozen=True)
class Cost:
    """A row.

    Attributes:
        name: how it is called.
        of: what leaves with every bundle of a line when those below it have left, > 0. [bundles]
        total: of a model.
    """

    name: str
    of: Callable[[Line], Floats]
    total: Callable[[Facts], Total]


def _parameters_of(line: Line) -> Floats:
    return line.sums([group.parameters for group in line.groups]).astype("float64")


def _parameters(facts: Facts) -> Total:
    dead = {tower: one.parameters for tower, one in facts.dead.items()}
    return Total(facts.parameters, facts.towers, facts.kinds, dead)


@dataclass(frozen=True)
class Times:
    """What a device wins when blocks get narrower, as it was measured. With it units are ranked by importance per time:
    the knapsack of HALP (arXiv 2110.10811) by its Lagrangian, on widths of a latency table as ZipLM's (NeurIPS 2023).

    Attributes:
        curves: key of every group of the dense model -> (shares of its indices that are kept, rising; what is won at
            each, falling to 0 at 1).
        per_parameter: what a parameter wins on average.
    """

    curves: Mapping[str, tuple[Floats, Floats]]
    per_parameter: float

    def rank(self, line: Line, sizes: Mapping[str, int]) -> Floats:
        """Scores of a line's bundles per time instead of per parameter, non-decreasing. [bundles].

        Where a bundle wins nothing until a later one leaves too, both are weighed together (isotonic regression), so
        that widths end where the device is faster.

        Args:
            sizes: indices per group of the dense model.
        """
        won = np.zeros(len(line.scores))
        for group in line.groups:
            kept = (group.size - line.bounds * group.indices_per_unit) / sizes[group.key]
            won += np.diff(np.interp(kept, *self.curves[group.key]))
        typical = self.per_parameter * _parameters_of(line)
        return _pooled(line.scores * typical, np.maximum(won, typical / DEAREST))


def _pooled(importance: Floats, time: Floats) -> Floats:
    """Their quotients, non-decreasing: neighbours out of order have a common one (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, cost in zip(importance.tolist(), time.tolist(), strict=True):
        block = (value, cost, 1)
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    return np.repeat([value / cost for value, cost, _ in blocks], [count for *_, count in blocks])


COSTS: Mapping[str, Cost] = {row.name: row for row in (Cost("parameters", _parameters_of, _parameters),)}
