"""The same share of every group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimvlm.compress.allocate.balanced import allocate_global
from slimvlm.compress.allocate.pool import Flags, Pool


def allocate_local(pool: Pool, target: float) -> Flags:
    """The same fraction of every group, or fractions in proportion to `pool.share`: units go by their rank in it."""
    order = np.lexsort((np.arange(len(pool.scores)), pool.scores, pool.group))
    counts = np.bincount(pool.group, minlength=pool.groups)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    scores = (rank + 0.5) / counts[pool.group]
    return allocate_global(
        replace(pool, scores=scores if pool.share is None else scores / pool.share[pool.group]), target
    )
