"""Keep chosen rows and columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from slimvlm.kernels.gather import cpu, reference


def gather_2d(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """A contiguous copy of weight[rows][:, cols], bit-exact, in the dtype of `weight`.

    Args:
        weight: [out, in], any dtype and strides.
        rows: int32 or int64 indices, each at most once, in any order; None keeps all.
        cols: the same for columns.

    Raises:
        ValueError: not a matrix, or indices of another dtype or device, out of range, repeated or not contiguous.
    """
    if weight.ndim != 2:
        raise ValueError(f"gather_2d: weight must be a matrix, got shape {tuple(weight.shape)}")
    for name, index, size in (("rows", rows, weight.shape[0]), ("cols", cols, weight.shape[1])):
        if index is not None:
            _check(name, index, size, weight)
    path = cpu if weight.device.type == "cpu" else reference
    return path.gather_2d(weight.detach(), rows, cols)


def _check(name: str, index: Tensor, size: int, weight: Tensor) -> None:
    what = f"gather_2d: {name} {tuple(index.shape)} of weight {tuple(weight.shape)}"
    if index.ndim != 1 or not index.is_contiguous():
        raise ValueError(f"{what} must be a contiguous vector")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{what} must be int32 or int64, got {index.dtype}")
    if index.device != weight.device:
        raise ValueError(f"{what} is on {index.device}, weight on {weight.device}")
    if index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{what} must lie in 0..{size - 1}, got {low}..{high}")
    if index.numel() > size or torch.unique(index).numel() < index.numel():
        raise ValueError(f"{what} holds an index twice")
