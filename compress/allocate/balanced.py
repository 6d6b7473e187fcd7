"""Which units go: a target number of parameters and constant scores in, one flag per unit out.

UKMP balances the modalities: scores are divided by the mean of their modality's survivors, the lowest units of all go,
the means are taken again, until the target is met. Inside a modality the division changes no order, so one sorted list
per modality with its suffix sums replaces the paper's repeated scoring: O(U log U) instead of O(steps * weights).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from slimvlm.compress.errors import InfeasibleBudgetError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Steps = tuple[int, int] | None

PAPER_STEPS = (1000, 100)  # units per step, before and after 90 % of the target
STEP_SHARE = 500  # the same share of BLIP-2's 488,304 units, for models of any size
FINE_FROM = 0.9
FREEZE_BELOW = 10  # the paper leaves a group alone once fewer than a tenth of its channels are left


@dataclass(frozen=True)
class Pool:
    """The units to choose from; arrays over units are ordered by group, and inside a group by preference among equals.

    Attributes:
        scores: importance, finite and >= 0. [units]
        group: group number of each unit, non-decreasing. [units]
        cost: parameters that leave with a unit, > 0. [units]
        channels: matrix rows a unit holds (1 for an MLP channel, D for a head). [units]
        modality: modality number. [units]
        size: channels of each group in the dense model. [groups]
        floor: fraction of `size` every group keeps (and at least one unit).
    """

    scores: Floats
    group: Integers
    cost: Integers
    channels: Integers
    modality: Integers
    size: Integers
    floor: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError where arrays disagree or a score is no number."""
        lengths = {len(getattr(self, name)) for name in ("scores", "group", "cost", "channels", "modality")}
        if len(lengths) > 1:
            raise ValueError(f"pool: arrays over units have different lengths {sorted(lengths)}")
        if not np.isfinite(self.scores).all() or (self.scores < 0).any():
            raise ValueError("pool: scores must be finite and not negative")
        if (np.diff(self.group) < 0).any() or (len(self.group) and self.group[-1] >= len(self.size)):
            raise ValueError(f"pool: units must be ordered by group, with group numbers below {len(self.size)}")

    @property
    def groups(self) -> int:
        return len(self.size)

    @cached_property
    def protected(self) -> Flags:
        """The best units of every group, which the floor keeps: a unit may go if those above it reach the floor."""
        order = np.lexsort((np.arange(len(self.scores)), self.scores, self.group))
        held = np.cumsum(self.channels[order])
        last = np.searchsorted(self.group[order], np.arange(self.groups), side="right") - 1
        above = held[last][self.group[order]] - held  # channels of the better units of the same group
        flags = np.empty(len(order), dtype=bool)
        flags[order] = above < np.maximum(np.ceil(self.floor * self.size - 1e-9), 1)[self.group[order]]
        return flags


@dataclass
class _Queue:
    """Units of one modality that may still go, lowest score first; what went is always a prefix."""

    units: Integers
    scores: Floats
    suffix: Floats  # suffix[i] = sum of scores[i:]: exact enough however much has gone, unlike a running difference
    start: int = 0

    @classmethod
    def of(cls, pool: Pool, ordered: Integers) -> _Queue:
        scores = pool.scores[ordered]
        return cls(ordered, scores, np.append(np.cumsum(scores[::-1])[::-1], 0.0))

    def __len__(self) -> int:
        return len(self.units) - self.start

    @property
    def total(self) -> float:
        return float(self.suffix[self.start])

    def lowest(self, count: int) -> tuple[Integers, Floats]:
        """The next `count` units and their scores."""
        window = slice(self.start, self.start + count)
        return self.units[window], self.scores[window]


def allocate_balanced(pool: Pool, target: float, *, faithful: bool = False, steps: Steps = None) -> Flags:
    """UKMP's modality-balanced selection; True for the units that go.

    The product path takes units in the order (normalised score, group, position) and never breaks a floor; from the
    first unit that would overshoot on, smaller ones fill what is left (see `_landed`). `faithful` is the paper's loop
    to the letter: whole steps, ties at the threshold all go, and a group is left alone only from the step AFTER it fell
    below a tenth of its channels or to exactly one.

    Args:
        pool: the units.
        target: parameters to remove.
        steps: units per step before and after 90 % of the target.

    Raises:
        InfeasibleBudgetError: the floors (or, faithful, the frozen groups) leave too few parameters to remove.
    """
    if faithful:
        return _literal(pool, target, steps or PAPER_STEPS)
    return _exact(pool, target, steps or proportional_steps(len(pool.scores)))


def proportional_steps(units: int) -> tuple[int, int]:
    """Steps that are the same share of `units` as the paper's are of its model's."""
    coarse = max(1, units // STEP_SHARE)
    return coarse, max(1, coarse // 10)


def allocate_global(pool: Pool, target: float, *, faithful: bool = False, steps: Steps = None) -> Flags:
    """One ranking over all groups, without the modality means; otherwise as `allocate_balanced`."""
    one = replace(pool, modality=np.zeros_like(pool.modality))
    return allocate_balanced(one, target, faithful=faithful, steps=steps)


def allocate_local(pool: Pool, target: float, *, faithful: bool = False, steps: Steps = None) -> Flags:
    """The same fraction of every group: units go by their rank in it. `faithful` removes floor(fraction * units)."""
    order = np.lexsort((np.arange(len(pool.scores)), pool.scores, pool.group))
    counts = np.bincount(pool.group, minlength=pool.groups)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    units = counts[pool.group]
    if faithful:
        return rank < np.floor(target / pool.cost.sum() * units)
    return allocate_global(replace(pool, scores=(rank + 0.5) / units), target, steps=steps)


def _queues(pool: Pool, candidates: Flags) -> list[_Queue]:
    """One queue per modality, of its candidate units."""
    order = np.argsort(pool.scores, kind="stable")
    order = order[candidates[order]]
    return [_Queue.of(pool, order[pool.modality[order] == modality]) for modality in np.unique(pool.modality)]


ALLOCATORS = {"balanced": allocate_balanced, "global": allocate_global, "local": allocate_local}


def _exact(pool: Pool, target: float, steps: tuple[int, int]) -> Flags:
    protected = pool.protected
    _require(int(pool.cost[~protected].sum()), target, f"the floor of {pool.floor:.0%} of every group")
    queues = _queues(pool, ~protected)
    left = np.bincount(pool.group[~protected], minlength=pool.groups)
    # Like the paper, a group that can lose nothing more leaves its modality's mean, kept units included.
    kept_sums = np.bincount(pool.group, np.where(protected, pool.scores, 0), minlength=pool.groups)
    kept_counts = np.bincount(pool.group[protected], minlength=pool.groups)
    modality = np.zeros(pool.groups, dtype=np.int64)
    modality[pool.group] = pool.modality
    gone, going = 0, [np.zeros(0, dtype=np.int64)]
    while gone < target:
        queues = [queue for queue in queues if len(queue)]
        step = steps[int(gone > FINE_FROM * target)]
        means = []
        for queue in queues:
            active = (left > 0) & (modality == pool.modality[queue.units[0]])
            means.append((queue.total + kept_sums[active].sum()) / (len(queue) + kept_counts[active].sum()) or 1.0)
        chosen = _ranked(queues, means, step)[:step]
        fits = int(np.searchsorted(np.cumsum(pool.cost[chosen]), target - gone, side="right"))
        if fits < len(chosen):
            order = _ranked(queues, means, len(pool.scores))
            return _landed(pool, np.concatenate([*going, order[:fits]]), order[fits:], target)
        gone += int(pool.cost[chosen].sum())
        going.append(chosen)
        left -= np.bincount(pool.group[chosen], minlength=pool.groups)
        for queue in queues:
            queue.start += int((pool.modality[chosen] == pool.modality[queue.units[0]]).sum())
    return _landed(pool, np.concatenate(going), np.zeros(0, dtype=np.int64), target)


def _ranked(queues: list[_Queue], means: list[float], count: int) -> Integers:
    """The first `count` units of every queue, lowest score over its queue's mean first, equal ones by number."""
    windows = [queue.lowest(count) for queue in queues]
    units = np.concatenate([units for units, _ in windows])
    scores = np.concatenate([scores / mean for (_, scores), mean in zip(windows, means, strict=True)])
    return units[np.lexsort((units, scores))]


def _landed(pool: Pool, going: Integers, order: Integers, target: float) -> Flags:
    """What goes once the next unit of `order` would overshoot: as near to the target as the units allow.

    Units that still fit go in their turn. Where what is then missing is more than what the smallest unit left would
    overshoot by, it goes as well, and the last units that fit in the overshoot stay for it.
    """
    removed = np.zeros(len(pool.scores), dtype=bool)
    room = target - int(pool.cost[going].sum())
    filled = _fitting(pool, order, room)
    room -= int(pool.cost[filled].sum())
    going = np.concatenate([going, filled])
    removed[going] = True
    rest = order[~removed[order]]
    if len(rest):
        first = rest[np.sort(np.unique(pool.group[rest], return_index=True)[1])]  # of every group, in order
        unit = first[np.argmin(pool.cost[first])]
        over = int(pool.cost[unit]) - room
        back = _fitting(pool, going[pool.group[going] != pool.group[unit]][::-1], over)
        if over - int(pool.cost[back].sum()) < room:
            removed[unit] = True
            removed[back] = False
    return removed


def _fitting(pool: Pool, order: Integers, room: float) -> Integers:
    """The units of `order` that fit in `room` one after the other; a group is left at its first that does not."""
    taken, closed = [], np.zeros(pool.groups, dtype=bool)
    smallest = int(pool.cost[order].min(initial=0))
    for unit in order:
        if room < smallest:
            break
        if not closed[pool.group[unit]]:
            closed[pool.group[unit]] = pool.cost[unit] > room
            if pool.cost[unit] <= room:
                taken.append(unit)
                room -= int(pool.cost[unit])
    return np.array(taken, dtype=np.int64)


def _literal(pool: Pool, target: float, steps: tuple[int, int]) -> Flags:
    removed = np.zeros(len(pool.scores), dtype=bool)
    kept = np.bincount(pool.group, pool.channels, minlength=pool.groups).astype(np.int64)
    frozen = np.zeros(pool.groups, dtype=bool)
    queues = _queues(pool, ~removed)
    gone = 0
    while gone < target:
        now = (FREEZE_BELOW * kept < pool.size) | (kept == 1)
        if (now != frozen).any():
            frozen = now
            left = [queue.lowest(len(queue))[0] for queue in queues]
            queues = [_Queue.of(pool, units[~frozen[pool.group[units]]]) for units in left]
        queues = [queue for queue in queues if len(queue)]
        if not queues:
            _require(gone, target, "the paper's loop, which leaves a group alone below a tenth of its channels,")
        chosen = _below_threshold(queues, steps[int(gone > FINE_FROM * target)])
        removed[chosen] = True
        gone += int(pool.cost[chosen].sum())
        kept -= np.bincount(pool.group[chosen], pool.channels[chosen], minlength=pool.groups).astype(np.int64)
    return removed


def _below_threshold(queues: list[_Queue], step: int) -> Integers:
    """Take every unit whose normalised score is at most the `step`-th smallest; all, if there are fewer than `step`."""
    means = [queue.total / len(queue) or 1.0 for queue in queues]
    lowest = np.concatenate([queue.lowest(step)[1] / mean for queue, mean in zip(queues, means, strict=True)])
    threshold = np.partition(lowest, step - 1)[step - 1] if step <= len(lowest) else np.inf
    chosen = []
    for queue, mean in zip(queues, means, strict=True):
        count = step
        while count < len(queue) and queue.scores[queue.start + count - 1] / mean <= threshold:
            count *= 2  # ties reach beyond the window
        units, scores = queue.lowest(count)
        taken = int(np.searchsorted(scores / mean, threshold, side="right"))
        chosen.append(units[:taken])
        queue.start += taken
    return np.concatenate(chosen)


def _require(reachable: int, target: float, why: str) -> None:
    if reachable < target:
        raise InfeasibleBudgetError(
            f"cannot remove {int(np.ceil(target)):,} parameters from these groups: {why} allows at most {reachable:,}; "
            "ask for less"
        )
