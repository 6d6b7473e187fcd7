"""The same share of every group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimvlm.compress.allocate.balanced import order_global
from slimvlm.compress.allocate.pool import Integers, Pool


def order_local(pool: Pool, target: float) -> Integers:
    """The same fraction of every group, or fractions in proportion to `pool.share`: units go by their rank in it."""
    order = np.lexsort((np.arange(len(pool.scores)), pool.scores, pool.group))
    counts = np.bincount(pool.group, minlength=pool.groups)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    scores = (rank + 0.5) / counts[pool.group]
    return order_global(replace(pool, scores=scores if pool.share is None else scores / pool.share[pool.group]), target)
