"""Which units go: a target number of parameters and constant scores in, the units that go out.

UKMP balances the modalities: scores are divided by the mean of their modality's survivors, the lowest units of all go,
the means are taken again, until the target is met. Inside a modality the division changes no order, so one sorted list
per modality with its suffix sums replaces the paper's repeated scoring: O(U log U) instead of O(steps * weights).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimvlm.compress.allocate.pool import FINE_FROM, Integers, Pool, Queue, proportional_steps, queues_of, require


def order_global(pool: Pool, target: float) -> Integers:
    """One ranking over all groups, without the modality means; otherwise as `order_balanced`."""
    return order_balanced(replace(pool, modality=np.zeros_like(pool.modality)), target)


def order_balanced(pool: Pool, target: float) -> Integers:
    """UKMP's modality-balanced selection: the units that go, in the order they do.

    Takes units in the order (normalised score, group, position) and never breaks a floor; from the first unit that
    would overshoot on, smaller ones fill what is left (see `_landed`). `order_paper` is the paper's own loop.

    Args:
        pool: the units.
        target: cost to remove.

    Raises:
        InfeasibleBudgetError: the floors leave too little to remove.
    """
    steps = pool.steps or proportional_steps(len(pool.scores))
    protected = pool.protected
    require(float(pool.cost[~protected].sum()), target, f"the floor of {pool.floor:.0%} of every group")
    queues = queues_of(pool, ~protected)
    left = np.bincount(pool.group[~protected], minlength=pool.groups)
    # Like the paper, a group that can lose nothing more leaves its modality's mean, kept units included.
    kept_sums = np.bincount(pool.group, np.where(protected, pool.scores, 0), minlength=pool.groups)
    kept_counts = np.bincount(pool.group[protected], minlength=pool.groups)
    modality = np.zeros(pool.groups, dtype=np.int64)
    modality[pool.group] = pool.modality
    gone, going = 0.0, [np.zeros(0, dtype=np.int64)]
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
        gone += pool.cost[chosen].sum()
        going.append(chosen)
        left -= np.bincount(pool.group[chosen], minlength=pool.groups)
        for queue in queues:
            queue.start += int((pool.modality[chosen] == pool.modality[queue.units[0]]).sum())
    return _landed(pool, np.concatenate(going), np.zeros(0, dtype=np.int64), target)


def _ranked(queues: list[Queue], means: list[float], count: int) -> Integers:
    """The first `count` units of every queue, lowest score over its queue's mean first, equal ones by number."""
    windows = [queue.lowest(count) for queue in queues]
    units = np.concatenate([units for units, _ in windows])
    scores = np.concatenate([scores / mean for (_, scores), mean in zip(windows, means, strict=True)])
    return units[np.lexsort((units, scores))]


def _landed(pool: Pool, going: Integers, order: Integers, target: float) -> Integers:
    """What goes once the next unit of `order` would overshoot: as near to the target as the units allow.

    Units that still fit go in their turn. Where what is then missing is more than what the smallest unit left would
    overshoot by, it goes as well, and the last units that fit in the overshoot stay for it.
    """
    room = target - pool.cost[going].sum()
    filled = _fitting(pool, order, room)
    room -= pool.cost[filled].sum()
    going = np.concatenate([going, filled])
    rest = order[~np.isin(order, filled)]
    if len(rest):
        first = rest[np.sort(np.unique(pool.group[rest], return_index=True)[1])]  # of every group, in order
        unit = first[np.argmin(pool.cost[first])]
        over = pool.cost[unit] - room
        back = _fitting(pool, going[pool.group[going] != pool.group[unit]][::-1], over)
        if over - pool.cost[back].sum() < room:
            return np.append(going[~np.isin(going, back)], unit)
    return going


def _fitting(pool: Pool, order: Integers, room: float) -> Integers:
    """The units of `order` that fit in `room` one after the other; a group is left at its first that does not."""
    taken, closed = [], np.zeros(pool.groups, dtype=bool)
    smallest = pool.cost[order].min(initial=0)
    for unit in order:
        if room < smallest:
            break
        if not closed[pool.group[unit]]:
            closed[pool.group[unit]] = pool.cost[unit] > room
            if pool.cost[unit] <= room:
                taken.append(unit)
                room -= pool.cost[unit]
    return np.array(taken, dtype=np.int64)
