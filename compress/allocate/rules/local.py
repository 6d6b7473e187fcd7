"""The same share of every group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from slimvlm.compress.allocate.pool import Floats, Integers, Pool
from slimvlm.compress.allocate.rules.balanced import order_global

ROUNDING = 1e-9  # what is a whole number of blocks but for it is one
FIRST, LAST = 1 / 8, 1 / 16  # of a tower's blocks: of LLaMA's 32 the first four and the last two


def order_local(pool: Pool, target: float) -> Integers:
    """The same fraction of every group: units go by their rank in it."""
    return order_global(replace(pool, scores=ranks(pool)), target)


def order_llm_pruner(pool: Pool, target: float) -> Integers:
    """The same fraction of every group but those of the first and last blocks of a tower, which lose something once
    the others are at their floors (Ma, Fang, Wang, LLM-Pruner, NeurIPS 2023, where they lose nothing).

    Raises:
        ValueError: nothing is said of where the units are.
    """
    if pool.place is None:
        raise ValueError("llm-pruner needs the place of every unit in its tower")
    spared = (pool.place < np.array([FIRST, LAST]) - ROUNDING).any(1)
    return order_global(replace(pool, scores=ranks(pool) + spared), target)


def ranks(pool: Pool) -> Floats:
    """Of each unit the part of its group that is below it, by score. [units]."""
    order = np.lexsort((np.arange(len(pool.scores)), pool.scores, pool.group))
    counts = np.bincount(pool.group, minlength=pool.groups)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (rank + 0.5) / counts[pool.group]
