"""What the allocators take or leave: bundles of units, ranked by score.

A bundle is usually one unit. For widths that are a multiple of N it is N channels of neighbouring rank; for the stock
layout it is the i-th lowest unit of every group whose width one config field sets, and so many ranks that the
unmodified class builds what is left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray

from slimvlm.compress.allocate.costs import Cost, Times
from slimvlm.compress.allocate.facts import Facts
from slimvlm.compress.allocate.pool import Floats, Integers, Pool
from slimvlm.compress.criteria.scoring import Scores
from slimvlm.compress.errors import InfeasibleBudgetError
from slimvlm.compress.models.experts import ALIGNED
from slimvlm.compress.models.families import Attention, Experts, Mlp
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.saving import set_fields, stock_values


@dataclass(frozen=True)
class Line:
    """Groups that are cut alike, with their units ranked from the least important, in bundles of ranks.

    Attributes:
        groups: they have equally many units.
        ranks: per group the unit numbers, lowest score first (equal ones by number). [units] each
        bounds: bundle i holds the ranks bounds[i] .. bounds[i + 1]. [bundles + 1]
        scores: mean over the weights of a bundle, non-decreasing. [bundles]
        importance: of the groups as wholes, their sum; None: nobody asked.
    """

    groups: tuple[Group, ...]
    ranks: tuple[Integers, ...]
    bounds: Integers
    scores: Floats
    importance: float | None = None

    @property
    def kind(self) -> str:
        return self.groups[0].kind

    @property
    def towers(self) -> tuple[str, ...]:
        return tuple(sorted({group.tower for group in self.groups}))

    @property
    def widths(self) -> Integers:
        """Units of each of the groups that are in a bundle, int64 [bundles]."""
        return np.diff(self.bounds)

    @property
    def channels(self) -> Integers:
        """Matrix rows that leave with a bundle, int64 [bundles]."""
        return self.widths * sum(group.indices_per_unit * group.head_dim for group in self.groups)

    def sums(self, values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Over the units of each bundle, of `values`: one array per group, in the order of its units. [bundles]."""
        ranked = sum(value[order] for value, order in zip(values, self.ranks, strict=True))
        return np.add.reduceat(ranked, self.bounds[:-1])


def lines_of(groups: Sequence[Group], scores: Scores, round_channels: int) -> list[Line]:
    """One line per group."""
    return [_line((group,), scores, _widths(group, round_channels)) for group in groups]


def stock_lines_of(groups: Sequence[Group], scores: Scores, round_channels: int, facts: Facts) -> list[Line]:
    """One line per set of config fields of the unmodified class; groups whose width it cannot set are left out.

    Raises:
        InfeasibleBudgetError: it can set none, or one field would have to set widths that differ already.
    """
    classes: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        if group.part.fields:
            classes.setdefault((group.home.config, *(name for name, _ in group.part.fields)), []).append(group)
    if not classes:
        raise InfeasibleBudgetError(
            f"layout stock: the unmodified class of family {facts.family.name!r} can build no cut; "
            "use --layout per-layer"
        )
    for fields, members in classes.items():
        if len({(group.size, group.num_units) for group in members}) > 1:
            raise InfeasibleBudgetError(
                f"layout stock: {'.'.join(fields[:2])} holds for layers that have different widths already; "
                "use --layout per-layer"
            )
    return [
        _line(tuple(members), scores, _buildable(members[0], _widths(members[0], round_channels), facts.config))
        for members in classes.values()
    ]


def pool_of(
    lines: Sequence[Line], cost: Cost, dense_sizes: Mapping[str, int], times: Times | None = None, **asked: Any
) -> Pool:
    """The lines' bundles as the units of an allocation; floors refer to `dense_sizes` (indices per group key).

    Args:
        times: rank by importance per time, not per parameter.
        asked: the fields of the pool that no line knows: floor, steps, ratio.
    """
    counts = [len(line.scores) for line in lines]
    names = sorted({line.groups[0].modality for line in lines})
    modality = [names.index(line.groups[0].modality) for line in lines]
    return Pool(
        scores=np.concatenate([times.rank(line, dense_sizes) if times else line.scores for line in lines]),
        group=np.repeat(np.arange(len(lines)), counts),
        cost=np.concatenate([cost.of(line) for line in lines]),
        channels=np.concatenate([line.channels for line in lines]),
        modality=np.repeat(modality, counts),
        size=np.array([sum(dense_sizes[group.key] * group.head_dim for group in line.groups) for line in lines]),
        place=np.concatenate(_places(lines)),
        importance=None if lines[0].importance is None else np.array([line.importance for line in lines]),
        **asked,
    )


def _places(lines: Sequence[Line]) -> list[Floats]:
    """Per line the parts of the tower that are before a bundle's block, and behind it; of several the least."""
    places, depths = [], dict[str, int]()
    for group in (group for line in lines for group in line.groups):
        depths[group.tower] = max(depths.get(group.tower, 0), group.size if group.blocks else group.layer + 1)
    for line in lines:
        found = []
        for group, order in zip(line.groups, line.ranks, strict=True):
            numbers = np.array([block.index for block in group.blocks] or [group.layer] * group.num_units)
            before = numbers[order][line.bounds[:-1]] / depths[group.tower]
            found.append(np.stack([before, 1 - before - 1 / depths[group.tower]], axis=1))
        places.append(np.min(found, axis=0))
    return places


def _widths(group: Group, round_channels: int) -> Integers:
    """The numbers of units it may keep, besides all and none."""
    step = round_channels if group.kind == "mlp" else 1
    if isinstance(group.part, Experts):
        step = math.lcm(step, ALIGNED)
    return np.arange(step, group.num_units, step)


def _buildable(group: Group, widths: Integers, config: object) -> Integers:
    """Those of `widths` that the config of the unmodified class takes: any number of blocks and channels, not of heads
    and times the block's width."""
    if not isinstance(group.part, Attention) and not (isinstance(group.part, Mlp) and group.part.ratio):
        return widths
    return np.array([units for units in widths.tolist() if _takes(config, group.narrowed(units))], dtype=np.int64)


def _takes(config: object, group: Group) -> bool:
    try:
        set_fields(copy.copy(attrgetter(group.home.config)(config)), stock_values(group))
    except StrictDataclassError:
        return False
    return True


def _line(groups: tuple[Group, ...], scores: Scores, widths: Integers) -> Line:
    units = groups[0].num_units
    bounds = np.unique(np.concatenate([[0], units - widths, [units]]))
    values = [scores.values[group.key].double().numpy() for group in groups]
    ranks = tuple(np.argsort(value, kind="stable") for value in values)
    weights = np.array([group.weights_per_unit for group in groups], dtype=np.float64)
    totals = [np.add.reduceat(value[order], bounds[:-1]) for value, order in zip(values, ranks, strict=True)]
    means = (weights / weights.sum()) @ np.stack(totals) / np.diff(bounds)
    importance = None if scores.importance is None else sum(scores.importance[group.key] for group in groups)
    # Rounding of the means must not reverse the ranks.
    return Line(groups, ranks, bounds, np.maximum.accumulate(means), importance)
