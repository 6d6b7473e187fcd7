"""From scores to a Plan: how much goes from where.

The ratio counts ALL parameters of the DENSE model, as in UKMP (AAAI 2025), also where a plan is made in rounds on a
partly cut one. Kinds and towers with a ratio of their own come first; the rest of the model carries what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.allocate.bundles import Line, lines_of, pool_of, stock_lines_of
from slimvlm.compress.allocate.costs import COSTS, Times, Total
from slimvlm.compress.allocate.facts import Facts
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.allocate.pool import Floats, Integers
from slimvlm.compress.criteria.scoring import Scores
from slimvlm.compress.errors import InfeasibleBudgetError
from slimvlm.compress.models.groups import Dead, Group
from slimvlm.compress.options import KINDS, LAYOUTS
from slimvlm.compress.plan import BLOCK, Plan, TowerCount


@dataclass(frozen=True)
class Budget:
    """What may go. All ratios refer to the dense model.

    Attributes:
        ratio: fraction of all parameters to remove.
        tower_ratio: tower -> fraction of the parameters of its blocks to remove.
        kind_ratio: `attention` or `mlp` -> fraction of its prunable parameters to remove, over all towers.
        round_channels: every MLP that is cut keeps a multiple of this many channels.
        floor: fraction of its dense size every group keeps, and at least one unit.
        allocator: one of ALLOCATORS.
        cost: one of COSTS, whose sum over what goes meets the ratios.
        times: rank by importance per measured time, not per parameter.
        steps: units per step of a loop before and after 90 % of what goes; None: the allocator's own.
        layout: `per-layer`, or `stock`: only cuts that the unmodified class can be configured to build.

    Raises:
        InfeasibleBudgetError: a value no plan can have, or a combination that contradicts itself.
    """

    ratio: float
    tower_ratio: Mapping[str, float] = field(default_factory=dict)
    kind_ratio: Mapping[str, float] = field(default_factory=dict)
    round_channels: int = 1
    floor: float = 0.1
    allocator: str = "balanced"
    cost: str = "parameters"
    times: Times | None = None
    steps: tuple[int, int] | None = None
    layout: str = "per-layer"

    def __post_init__(self) -> None:
        ratios = [("ratio", self.ratio), *self.tower_ratio.items(), *self.kind_ratio.items(), ("floor", self.floor)]
        for name, value in ratios:
            if not 0 <= value < 1:
                raise InfeasibleBudgetError(f"{name} {value:g} is no fraction to remove; accepted are 0 <= value < 1")
        choices = [
            ("allocator", self.allocator, ALLOCATORS), ("cost", self.cost, COSTS), ("layout", self.layout, LAYOUTS)
        ]  # fmt: skip
        for what, name, known in choices + [("kind", kind, KINDS) for kind in self.kind_ratio]:
            if name not in known:
                raise InfeasibleBudgetError(f"{what} {name!r} is unknown; choose one of {', '.join(known)}")
        if self.round_channels < 1:
            raise InfeasibleBudgetError(f"round_channels {self.round_channels} is no width; accepted is 1 or more")
        parts = self.tower_ratio or self.kind_ratio or self.round_channels > 1 or self.layout == "stock"
        if parts and not ALLOCATORS[self.allocator].floors:
            raise InfeasibleBudgetError(
                f"the allocator {self.allocator} has one ratio for all parts; leave out tower ratios, kind ratios, "
                "rounded channels and the stock layout"
            )

    def scaled(self, share: float, begun: Plan | None = None) -> Budget:
        """The budget of an early round: this share of every ratio, or of what the plan `begun` left of it to do."""

        def part(value: float, gone: float) -> float:
            return gone + (value - gone) * share

        counts = begun.towers if begun else {}
        towers = {name: part(value, counts[name].removed if begun else 0.0) for name, value in self.tower_ratio.items()}
        kinds = {name: value * share for name, value in self.kind_ratio.items()}
        ratio = part(self.ratio, begun.removed_fraction if begun else 0.0)
        return replace(self, ratio=ratio, tower_ratio=towers, kind_ratio=kinds)


def plan_units(groups: Sequence[Group], scores: Scores, budget: Budget, facts: Facts) -> Plan:
    """The plan of `order_units`."""
    return order_units(groups, scores, budget, facts).plan


def order_units(groups: Sequence[Group], scores: Scores, budget: Budget, facts: Facts) -> Order:
    """What goes, in which order, so that every ratio of `budget` is met to about half of its finest unit; always with
    the same bytes. What its plan cannot know of its making (digests, attention unit, rounds, seed) is for the caller
    to replace.

    Raises:
        InfeasibleBudgetError: no plan can; the message says what the largest possible ratio is.
    """
    if len({group.kind == BLOCK for group in groups}) > 1:
        raise ValueError("blocks and what is inside them are planned one after the other; see Plan.compose")
    if budget.layout == "stock":
        lines = stock_lines_of(groups, scores, budget.round_channels, facts)
    else:
        lines = lines_of(groups, scores, budget.round_channels)
    whens, rescued = _allocate(lines, budget, facts), []
    for line, when in zip(lines, whens, strict=True):
        if np.isfinite(when).all():  # an allocator without floors may empty a group; a layer needs one unit
            when[-1] = np.inf
            rescued += [group.key for group in line.groups]
    left, parameters, macs = _steps(groups, scores, list(zip(lines, whens, strict=True)), sorted(facts.towers))
    free = sum(one.parameters for one in facts.dead.values())
    plan = Plan(
        family=facts.family.name,
        model_digest="",
        calibration_digest="",
        attention_unit="auto",
        rounds=1,
        seed=0,
        criterion=scores.criterion.name,
        allocator=budget.allocator,
        layout=budget.layout,
        ratio=budget.ratio,
        parameters_before=facts.parameters,
        parameters_after=facts.parameters - free - int(parameters.sum()),
        towers=_tower_counts(facts, parameters.sum(0).tolist(), macs.sum(0).tolist()),
        sizes={group.key: group.size for group in groups},
        keep={key: tuple(np.flatnonzero(steps < 0).tolist()) for key, steps in left.items()},
        options=_options(scores, budget),
        dropped={tower: one.blocks for tower, one in facts.dead.items()},
        dropped_parameters=free,
        rescued=tuple(rescued),
    )
    return Order(plan, left, parameters, macs, (len(parameters),))


def _steps(
    groups: Sequence[Group], scores: Scores, leaving: Sequence[tuple[Line, Floats]], towers: Sequence[str]
) -> tuple[dict[str, Integers], Integers, Integers]:
    """`left`, `parameters` and `macs` of an Order: a step takes one bundle, those that go first first."""
    whens = np.concatenate([*(when for _, when in leaving), []])
    going = np.argsort(whens, kind="stable")[: np.isfinite(whens).sum()]
    numbers = np.full(len(whens), -1)
    numbers[going] = np.arange(len(going))
    left = {group.key: np.full(group.size, -1) for group in groups}
    parameters, macs = np.zeros((2, len(going), len(towers)), dtype=np.int64)
    for line, when in leaving:
        steps, numbers = np.split(numbers, [len(when)])
        goes = steps >= 0
        for group, order in zip(line.groups, line.ranks, strict=True):
            left[group.key][scores.members[group.key].numpy()[order]] = np.repeat(steps, line.widths)[:, None]
            for table, each in ((parameters, group.parameters), (macs, group.macs)):
                table[steps[goes], towers.index(group.tower)] += np.add.reduceat(each[order], line.bounds[:-1])[goes]
    return left, parameters, macs


def _tower_counts(facts: Facts, parameters: Sequence[int], macs: Sequence[int]) -> dict[str, TowerCount]:
    counts = {}
    for column, tower in enumerate(sorted(facts.towers)):
        before, dead = (facts.towers[tower], facts.macs[tower]), facts.dead.get(tower, Dead(0, 0, 0))
        after = before[0] - dead.parameters - parameters[column], before[1] - dead.macs - macs[column]
        counts[tower] = TowerCount(before[0], after[0], before[1], after[1])
    return counts


def _options(scores: Scores, budget: Budget) -> dict[str, Any]:
    return {
        **{name: value for name, value in scores.criterion.facts().items() if name != "name"},
        "tower_ratio": dict(budget.tower_ratio),
        "kind_ratio": dict(budget.kind_ratio),
        "round_channels": budget.round_channels,
        "floor": budget.floor,
        **({"cost": "milliseconds"} if budget.times else {}),
    }


# ------------------------------------------------------------------ ratios


@dataclass(frozen=True)
class _Share:
    """One ratio: of the cost `base` in the dense model, `present` is left in the model at hand."""

    name: str
    ratio: float
    base: float
    present: float
    covers: Callable[[Line], bool]

    def __str__(self) -> str:
        return f"{self.name} {self.ratio:g}"


def _allocate(lines: Sequence[Line], budget: Budget, facts: Facts) -> list[Floats]:
    """Per line when its bundles go (inf: they stay), for the kinds, then the towers with a ratio of their own, then the
    whole: the share of all that goes for the same ratio which is gone then, so that at any time each ratio is met in
    proportion.
    """
    done: dict[int, Floats] = {}
    cost = COSTS[budget.cost]
    costs, dense = [cost.of(line) for line in lines], cost.total(facts.dense or facts)
    slack = 0.0  # a ratio is met within one bundle, so the ones after it may be missed by as much
    gone = sum(dense.dead.values())  # however little was asked for
    for share in _shares(lines, budget, dense, cost.total(facts)):
        covered = [index for index, line in enumerate(lines) if share.covers(line)]
        free = [index for index in covered if index not in done]
        lost = sum(costs[index][np.isfinite(done[index])].sum() for index in covered if index in done)
        target = share.ratio * share.base - (share.base - share.present) - lost
        slack += max((costs[index].max() for index in covered), default=0)
        if target < -slack - gone:
            least = share.ratio - target / share.base
            raise InfeasibleBudgetError(
                f"{share} is less than the other ratios remove already; raise it to {least:.4f} or lower those"
            )
        if target > 0 and free:
            whens = _take([lines[index] for index in free], share, target, (budget, facts))
        elif target > slack:
            raise InfeasibleBudgetError(
                f"{share} cannot be reached: nothing is left to remove besides parts that have a ratio of their own, "
                f"and they leave {int(target):,} parameters too many; raise those or free one part"
            )
        else:
            whens = [np.full(len(lines[index].scores), np.inf) for index in free]
        done.update(zip(free, whens, strict=True))
    return [done[index] for index in range(len(lines))]


def _of_kind(kind: str, line: Line) -> bool:
    return line.kind == kind


def _of_tower(tower: str, line: Line) -> bool:
    return tower in line.towers


def _shares(lines: Sequence[Line], budget: Budget, dense: Total, total: Total) -> list[_Share]:
    if absent := [kind for kind in budget.kind_ratio if not dense.kinds[kind]]:
        raise InfeasibleBudgetError(f"{absent[0]} ratio: no unit of that kind is planned here; leave it out")
    shares = [
        _Share(f"{kind} ratio", ratio, dense.kinds[kind], total.kinds[kind], partial(_of_kind, kind))
        for kind, ratio in sorted(budget.kind_ratio.items())
    ]
    for tower, ratio in sorted(budget.tower_ratio.items()):
        if tower not in total.towers:
            raise InfeasibleBudgetError(f"tower {tower!r} is unknown; this model has {', '.join(total.towers)}")
        shared = [line.towers for line in lines if tower in line.towers and len(line.towers) > 1]
        if shared:
            raise InfeasibleBudgetError(
                f"layout stock: {' and '.join(shared[0])} share their widths, so {tower} cannot have a ratio of "
                "its own; leave it out or use --layout per-layer"
            )
        base, present = dense.towers[tower], total.towers[tower] - total.dead.get(tower, 0)
        shares.append(_Share(f"{tower} ratio", ratio, base, present, partial(_of_tower, tower)))
    present = total.whole - sum(total.dead.values())
    return [*shares, _Share("ratio", budget.ratio, dense.whole, present, lambda line: True)]


def _take(lines: list[Line], share: _Share, target: float, context: tuple[Budget, Facts]) -> list[Floats]:
    """When the bundles of each line go, so that `target` parameters do: see `_allocate`."""
    budget, facts = context
    allocator = ALLOCATORS[budget.allocator]
    asked = {"floor": budget.floor, "steps": budget.steps, "ratio": share.ratio}
    pool = pool_of(lines, COSTS[budget.cost], (facts.dense or facts).sizes, budget.times, **asked)
    reachable = pool.cost[~pool.protected].sum()
    if reachable < target and allocator.floors:
        largest = np.floor((share.ratio - (target - reachable) / share.base) * 1e4) / 1e4
        others = " or free the parts that have a ratio of their own" if budget.tower_ratio or budget.kind_ratio else ""
        others += " or use --layout per-layer" if budget.layout == "stock" else ""
        raise InfeasibleBudgetError(
            f"{share} cannot be reached: every group keeps {budget.floor:.0%} of its units and at least one, so the "
            f"largest possible here is {largest:.4f}; ask for that or less{others}"
        )
    try:
        order = allocator(pool, target)
    except InfeasibleBudgetError as error:
        raise InfeasibleBudgetError(f"{share} cannot be reached: {error}") from None
    when = np.full(len(pool.scores), np.inf)
    when[order] = pool.cost[order].cumsum() / pool.cost[order].sum()
    return np.split(when, np.cumsum([len(line.scores) for line in lines])[:-1])
