"""The same share of every group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimvlm.compress.allocate.pool import Floats, Integers, Pool
from slimvlm.compress.allocate.rules.balanced import order_global


def order_local(pool: Pool, target: float) -> Integers:
    """The same fraction of every group: units go by their rank in it."""
    return order_global(replace(pool, scores=ranks(pool)), target)


def ranks(pool: Pool) -> Floats:
    """Of each unit the part of its group that is below it, by score. [units]."""
    order = np.lexsort((np.arange(len(pool.scores)), pool.scores, pool.group))
    counts = np.bincount(pool.group, minlength=pool.groups)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (rank + 0.5) / counts[pool.group]
