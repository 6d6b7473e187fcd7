"""Two-sided gather in torch: rows are taken a block at a time, so that no intermediate is larger than the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from slimvlm.kernels.gather import Blocks

BLOCK_BYTES = 1 << 21  # measured: 3 x two index selects on 8192 x 8192 at half of both


def gather_2d(weight: Tensor, rows: Tensor | None, cols: Tensor | None, out: Tensor) -> None:
    """As the reference, with O(1) extra memory."""
    if cols is None and rows is not None and weight.is_contiguous():
        torch.index_select(weight, 0, rows, out=out)
    else:
        _take_cols(weight, rows, [(cols, out)])


def gather_blocks(weight: Tensor, rows: Tensor | None, cols: Tensor | None, blocks: Blocks) -> None:
    """As the reference, reading every row once."""
    pruned = complement(cols, weight.shape[1], weight.device)
    _take_cols(weight, rows, [(cols, blocks.kept), (pruned, blocks.pruned_cols)])
    below = complement(rows, weight.shape[0], weight.device)
    _take_cols(weight, below, [(cols, blocks.pruned_rows), (pruned, blocks.pruned)])


def _take_cols(weight: Tensor, rows: Tensor | None, targets: Sequence[tuple[Tensor | None, Tensor]]) -> None:
    """Write weight[rows][:, cols] for every (cols, target); a block of rows serves all targets while it is cached."""
    count = weight.shape[0] if rows is None else rows.numel()
    step = max(1, BLOCK_BYTES // max(weight.shape[1] * weight.element_size(), 1))
    targets = [(cols, out) for cols, out in targets if out.numel()]
    for start in range(0, count if targets else 0, step):
        block = slice(start, min(start + step, count))
        kept = weight[block] if rows is None else weight.index_select(0, rows[block])
        for cols, out in targets:
            if cols is None:
                out[block] = kept
            else:
                torch.index_select(kept, 1, cols, out=out[block])


def complement(kept: Tensor | None, size: int, device: torch.device) -> Tensor:
    """The indices below `size` that are not in `kept`, ascending."""
    missing = torch.ones(size, dtype=torch.bool, device=device)
    missing[slice(None) if kept is None else kept.long()] = False
    return missing.nonzero().flatten()
