"""The paper's loop to the letter, with what goes wrong in it (research on UKMP 6.1): for comparison."""

from __future__ import annotations

import numpy as np

from slimvlm.compress.allocate.pool import (
    FINE_FROM,
    Flags,
    Integers,
    Pool,
    Queue,
    queues_of,
    require,
)

FREEZE_BELOW = 10  # the paper leaves a group alone once fewer than a tenth of its channels are left


def literal(pool: Pool, target: float, steps: tuple[int, int]) -> Flags:
    """Whole steps; ties at the threshold all go; a group is left alone from the step after it fell below a tenth."""
    removed = np.zeros(len(pool.scores), dtype=bool)
    kept = np.bincount(pool.group, pool.channels, minlength=pool.groups).astype(np.int64)
    frozen = np.zeros(pool.groups, dtype=bool)
    queues = queues_of(pool, ~removed)
    gone = 0
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
        removed[chosen] = True
        gone += int(pool.cost[chosen].sum())
        kept -= np.bincount(pool.group[chosen], pool.channels[chosen], minlength=pool.groups).astype(np.int64)
    return removed


def _below_threshold(queues: list[Queue], step: int) -> Integers:
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
