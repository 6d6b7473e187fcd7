"""The paper's loop to the letter, with what goes wrong in it (research on UKMP 6.1): for comparison."""

from __future__ import annotations

import numpy as np

from slimvlm.compress.allocate.pool import FINE_FROM, Integers, Pool, Queue, queues_of, require
from slimvlm.compress.options import LITTLE_RATIO

STEPS = (1000, 100)  # units, before and after 90 % of the target
FREEZE_BELOW = 10  # the paper leaves a group alone once fewer than a tenth of its channels are left


def order_paper(pool: Pool, target: float) -> Integers:
    """UKMP's modality-balanced selection as its code does it: the units that go, in the order they do.

    Whole steps, up to 20 % the small one from the start; ties at the threshold all go; a group is left alone from the
    step AFTER it fell below a tenth of its channels or to exactly one.

    Raises:
        InfeasibleBudgetError: the groups that are left alone leave too little to remove.
    """
    coarse, fine = pool.steps or STEPS
    steps = (fine if pool.ratio <= LITTLE_RATIO else coarse, fine)
    going = [np.zeros(0, dtype=np.int64)]
    kept = np.bincount(pool.group, pool.channels, minlength=pool.groups).astype(np.int64)
    frozen = np.zeros(pool.groups, dtype=bool)
    queues = queues_of(pool, np.ones(len(pool.scores), dtype=bool))
    gone = 0.0
    while gone < target:
        now = (FREEZE_BELOW * kept < pool.size) | (kept == 1)
        if (now != frozen).any():
            frozen = now
            left = [queue.lowest(len(queue))[0] for queue in queues]
            queues = [Queue.of(pool, units[~frozen[pool.group[units]]]) for units in left]
        queues = [queue for queue in queues if len(queue)]
        if not queues:
            require(gone, target, "the paper's loop, which leaves a group alone below a tenth of its channels,")
        chosen = _below_threshold(queues, steps[int(gone > FINE_FROM * target)])
        going.append(chosen)
        gone += pool.cost[chosen].sum()
        kept -= np.bincount(pool.group[chosen], pool.channels[chosen], minlength=pool.groups).astype(np.int64)
    return np.concatenate(going)


def _below_threshold(queues: list[Queue], step: int) -> Integers:
    """Take every unit whose normalised score is at most the `step`-th smallest, lowest first; all, if there are fewer
    than `step`.
    """
    means = [queue.total / len(queue) or 1.0 for queue in queues]
    lowest = np.concatenate([queue.lowest(step)[1] / mean for queue, mean in zip(queues, means, strict=True)])
    threshold = np.partition(lowest, step - 1)[step - 1] if step <= len(lowest) else np.inf
    chosen, normalised = [], []
    for queue, mean in zip(queues, means, strict=True):
        count = step
        while count < len(queue) and queue.scores[queue.start + count - 1] / mean <= threshold:
            count *= 2  # ties reach beyond the window
        units, scores = queue.lowest(count)
        taken = int(np.searchsorted(scores / mean, threshold, side="right"))
        chosen.append(units[:taken])
        normalised.append(scores[:taken] / mean)
        queue.start += taken
    units = np.concatenate(chosen)
    return units[np.lexsort((units, np.concatenate(normalised)))]
