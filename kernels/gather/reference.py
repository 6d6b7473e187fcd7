"""Plain formula of the two-sided gather; the tests hold every other path against it."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_2d(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """Two index selects, with an intermediate of the kept rows at full width."""
    kept = weight if rows is None else weight.index_select(0, rows)
    kept = kept if cols is None else kept.index_select(1, cols)
    return kept.clone(memory_format=torch.contiguous_format) if kept is weight else kept.contiguous()
