"""ECoFLaP's ratios per group, and inside a group the units of least score (Sung, Yoon, Bansal, ICLR 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any  # precision of numpy numbers

import numpy as np
from numpy.typing import NDArray

from slimvlm.compress.allocate.pool import Floats, Integers, Pool
from slimvlm.compress.allocate.rules.balanced import order_global
from slimvlm.compress.allocate.rules.local import ranks

BEYOND = 0.1  # no group loses a larger part than the whole does by more than this: the paper's scripts
PARTS = 2**40  # what is shared out is whole numbers; costs may be milliseconds
ROUNDING = 1e-9  # what is a whole number but for it is one
LAST = 1e-6  # of a group nothing of which is to go, if nothing else is left


def order_ecoflap(pool: Pool, target: float) -> Integers:
    """Of every group the part that `water_filling` leaves it to lose by `pool.importance`: lowest scores first.

    Parts are of the dense groups, also where the model is partly cut: what has gone counts.

    Raises:
        ValueError: nothing is said of the groups' importance.
    """
    if pool.importance is None:
        raise ValueError("ecoflap needs the importance of the groups; collect what its row asks for")
    present = np.bincount(pool.group, pool.cost, minlength=pool.groups)
    dense = present * pool.size / np.bincount(pool.group, pool.channels, minlength=pool.groups)
    sparsity = max(0.0, 1 - (present.sum() - target) / dense.sum())
    sizes = np.rint(dense * (PARTS / dense.sum())).astype(np.int64)
    goes = 1 - water_filling(sizes, pool.importance, sparsity, min(1, sparsity + BEYOND)) / sizes
    gone = 1 - (1 - ranks(pool)) * (present / dense)[pool.group]  # of its dense group, once a unit leaves
    return order_global(replace(pool, scores=gone / np.maximum(goes, LAST)[pool.group]), target)


def water_filling(sizes: Integers, importance: Floats, sparsity: float, cap: float) -> Integers:
    """How much of every group is kept: `sizes` less `cap` for all, the rest in proportion to `importance`.

    Groups that are full get no more. Where only such are important the rest is shared out by the room there is; the
    published code divides by zero there, and keeps more than asked for what it rounds up.

    Args:
        sizes: of the groups, in whole weights. [groups]
        importance: finite, >= 0. [groups]
        sparsity: fraction of all that goes, met to the weight.
        cap: fraction that goes of no group more than; at least `sparsity`.
    """
    total = _down(sizes.sum() * (1 - sparsity))
    kept = _up(sizes * (1 - cap))
    while (rest := total - kept.sum()) > 0:
        worth = np.where(kept < sizes, importance, 0.0)
        worth = worth if worth.any() else (sizes - kept).astype(np.float64)
        kept = np.minimum(sizes, kept + _up(worth / worth.sum() * rest))
    for _ in range(kept.sum() - total):  # what was rounded up
        kept[kept.argmax()] -= 1
    return kept


def _up(value: NDArray[np.floating[Any]]) -> Integers:
    return np.asarray(np.ceil(value - ROUNDING), dtype=np.int64)


def _down(value: float) -> int:
    return int(np.floor(value + ROUNDING))
