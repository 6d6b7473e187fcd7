"""Plain formulas of the two-sided gather; the tests hold every other path against them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from slimvlm.kernels.gather import Blocks


def gather_2d(weight: Tensor, rows: Tensor | None, cols: Tensor | None, out: Tensor) -> None:
    """Two index selects, with an intermediate of the kept rows at full width."""
    kept = weight if rows is None else weight.index_select(0, rows)
    out.copy_(kept if cols is None else kept.index_select(1, cols))


def gather_blocks(weight: Tensor, rows: Tensor | None, cols: Tensor | None, blocks: Blocks) -> None:
    """Four two-sided gathers."""
    sides = [(index, _complement(index, size)) for index, size in zip((rows, cols), weight.shape, strict=True)]
    pairs = [(row, col) for row in sides[0] for col in sides[1]]
    for (row, col), block in zip(pairs, blocks, strict=True):
        gather_2d(weight, row, col, block)


def _complement(kept: Tensor | None, size: int) -> Tensor:
    """The indices below `size` that are not in `kept`, ascending."""
    chosen = set(range(size) if kept is None else kept.tolist())
    return torch.tensor([index for index in range(size) if index not in chosen], dtype=torch.int64)
