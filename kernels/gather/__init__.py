"""Keep chosen rows and columns of a matrix, alone or together with everything that is not kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimvlm.kernels import dispatch


class Blocks(NamedTuple):
    """A matrix taken apart: kept rows x kept columns, kept x pruned, pruned x kept, pruned x pruned."""

    kept: Tensor
    pruned_cols: Tensor
    pruned_rows: Tensor
    pruned: Tensor


def gather_2d(weight: Tensor, rows: Tensor | None, cols: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """A contiguous copy of weight[rows][:, cols], bit-exact, in the dtype of `weight`.

    Args:
        weight: [out, in], any dtype and strides.
        rows: int32 or int64 indices, each at most once, in any order; None keeps all.
        cols: the same for columns.
        out: where to write, contiguous, of the result's shape, dtype and device, sharing no memory with `weight`.

    Raises:
        ValueError: not a matrix, an `out` that does not fit, or indices of another dtype or device, out of range,
            repeated or not contiguous.
    """
    _check(weight, rows, cols)
    shape = tuple(
        size if index is None else index.numel() for size, index in zip(weight.shape, (rows, cols), strict=True)
    )
    if out is None:
        out = weight.new_empty(shape)
    _check_out(out, weight, shape)
    dispatch.choose("gather", weight).gather_2d(weight.detach(), rows, cols, out)
    return out


def gather_blocks(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Blocks:
    """All four blocks of a cut in one read of the dense matrix: the cut weight, and what its recovery may recall (LPD).

    Args:
        weight: [out, in], any dtype and strides.
        rows: what is kept, as in `gather_2d`; the pruned rows follow in ascending order.
        cols: the same for columns.

    Raises:
        ValueError: as `gather_2d`.
    """
    _check(weight, rows, cols)
    (kept_rows, pruned_rows), (kept_cols, pruned_cols) = (
        (size, 0) if index is None else (index.numel(), size - index.numel())
        for index, size in zip((rows, cols), weight.shape, strict=True)
    )
    blocks = Blocks(
        weight.new_empty(kept_rows, kept_cols),
        weight.new_empty(kept_rows, pruned_cols),
        weight.new_empty(pruned_rows, kept_cols),
        weight.new_empty(pruned_rows, pruned_cols),
    )
    dispatch.choose("gather", weight).gather_blocks(weight.detach(), rows, cols, blocks)
    return blocks


def _check(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> None:
    if weight.ndim != 2:
        raise ValueError(f"gather_2d: weight must be a matrix, got shape {tuple(weight.shape)}")
    for name, index, size in (("rows", rows, weight.shape[0]), ("cols", cols, weight.shape[1])):
        if index is not None:
            _check_index(name, index, size, weight)


def _check_index(name: str, index: Tensor, size: int, weight: Tensor) -> None:
    what = f"gather_2d: {name} {tuple(index.shape)} of weight {tuple(weight.shape)}"
    if index.ndim != 1 or not index.is_contiguous():
        raise ValueError(f"{what} must be a contiguous vector")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{what} must be int32 or int64, got {index.dtype}")
    if index.device != weight.device:
        raise ValueError(f"{what} is on {index.device}, weight on {weight.device}")
    if index.numel() == 0:
        return
    seen = torch.zeros(size + 2, dtype=torch.bool, device=index.device)  # a place on either side for what is outside
    seen[index.clamp(-1, size) + 1] = True
    low, high, distinct = torch.stack([*index.long().aminmax(), seen.sum()]).tolist()  # one wait for the device
    if low < 0 or high >= size:
        raise ValueError(f"{what} must lie in 0..{size - 1}, got {low}..{high}")
    if distinct < index.numel():
        raise ValueError(f"{what} holds an index twice")


def _check_out(out: Tensor, weight: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(
            f"gather_2d: out {tuple(out.shape)} must be contiguous and of shape {shape} for weight "
            f"{tuple(weight.shape)}"
        )
    if out.dtype != weight.dtype or out.device != weight.device:
        raise ValueError(
            f"gather_2d: out is {out.dtype} on {out.device}, weight is {weight.dtype} on {weight.device}; "
            "they must be the same"
        )
    if out.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() and out.numel():
        raise ValueError(f"gather_2d: out {shape} shares memory with weight {tuple(weight.shape)}; give its own")
