"""The same share of every group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimvlm.compress.allocate.balanced import allocate_global
from slimvlm.compress.allocate.pool import (
    Flags,
    Pool,
    Steps,
)


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
