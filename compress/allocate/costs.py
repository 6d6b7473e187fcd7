"""What is won when units leave: the costs by name. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimvlm.compress.allocate.bundles import Line
    from slimvlm.compress.allocate.facts import Facts
    from slimvlm.compress.allocate.pool import Floats


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


COSTS: Mapping[str, Cost] = {row.name: row for row in (Cost("parameters", _parameters_of, _parameters),)}
