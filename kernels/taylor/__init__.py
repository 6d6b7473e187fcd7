"""Saliency of a linear's rows or columns from its weight and accumulated gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimvlm.kernels import dispatch

VARIANTS = ("first", "vectorized", "second", "mix")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    """One matrix to be reduced: its weight, its gradient and its squared gradient (None: the variant needs none)."""

    weight: Tensor
    grad: Tensor | None
    square: Tensor | None
    dim: int


def taylor_sums(
    weight: Tensor, grad: Tensor | None, dim: int, *, variant: str = "first", square: Tensor | None = None
) -> Tensor:
    """Taylor saliency of every row (dim 0) or column (dim 1), fp32[n], n = weight.shape[dim].

    UKMP section "importance": with S = W * G, `first` sums |S| over the other dimension, `vectorized` takes |sum of S|;
    with Q the accumulated squared gradients, `second` sums |W * Q * W| and `mix` sums |W * G - 0.5 * W * Q * W|.

    Args:
        weight: [out, in], any floating dtype and strides.
        grad: same shape, G; may be None for `second`.
        dim: the dimension that survives.
        variant: `first`, `vectorized`, `second` or `mix`.
        square: same shape, Q, for `second` and `mix` only.

    Raises:
        ValueError: unknown variant or dim, a missing operand, or shapes or devices that differ.
    """
    return taylor_sums_batch([weight], [grad], [dim], variant=variant, squares=[square])[0]


def taylor_sums_batch(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    dims: Sequence[int],
    *,
    variant: str = "first",
    squares: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`taylor_sums` of many matrices of any sizes; on a GPU one launch per combination of dtypes and layout.

    Args:
        weights: matrices on one device.
        grads: one per weight, as in `taylor_sums`.
        dims: one per weight.
        variant: of all.
        squares: one per weight; may be left out for `first` and `vectorized`.

    Raises:
        ValueError: as `taylor_sums`, or lists of different lengths.
    """
    if variant not in VARIANTS:
        raise ValueError(f"taylor_sums: variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    squares = [None] * len(weights) if squares is None else squares
    if not len(weights) == len(grads) == len(dims) == len(squares):
        raise ValueError(
            f"taylor_sums: {len(weights)} weights, {len(grads)} gradients, {len(dims)} dims, {len(squares)} squares; "
            "give one of each per matrix"
        )
    batch = []
    for weight, grad, dim, square in zip(weights, grads, dims, squares, strict=True):
        needed = {"second": {"square": square}, "mix": {"grad": grad, "square": square}}.get(variant, {"grad": grad})
        _check("taylor_sums", weight, dim, needed)
        batch.append(Operands(weight.detach(), needed.get("grad"), needed.get("square"), dim))
    return _reduce(batch, variant)


def squared_sums(weight: Tensor, grad: Tensor, dim: int) -> Tensor:
    """Sum of (w * g)^2 over the other dimension, fp32[weight.shape[dim]]: diagonal Fisher, to be added per micro-batch.

    Raises:
        ValueError: unknown dim, or shapes or devices that differ.
    """
    _check("squared_sums", weight, dim, {"grad": grad})
    return _reduce([Operands(weight.detach(), grad, None, dim)], "fisher")[0]


def _reduce(batch: Sequence[Operands], variant: str) -> list[Tensor]:
    if not batch:
        return []
    devices = {operands.weight.device for operands in batch}
    if len(devices) > 1:
        raise ValueError(f"taylor_sums: weights are on {sorted(map(str, devices))}; batch those of one device")
    tensors = [tensor for operands in batch for tensor in operands[:3]]
    sums: list[Tensor] = dispatch.choose("taylor", *tensors, dtypes=DTYPES).saliency_sums(batch, variant)
    return sums


def _check(function: str, weight: Tensor, dim: int, operands: dict[str, Tensor | None]) -> None:
    if weight.ndim != 2:
        raise ValueError(f"{function}: weight must be a matrix, got shape {tuple(weight.shape)}")
    if dim not in (0, 1):
        raise ValueError(f"{function}: dim must be 0 (a value per row) or 1 (a value per column), got {dim}")
    for name, operand in operands.items():
        if operand is None:
            raise ValueError(f"{function}: this variant needs {name!r}, got None")
        if operand.shape != weight.shape:
            raise ValueError(f"{function}: {name} {tuple(operand.shape)} must match weight {tuple(weight.shape)}")
        if operand.device != weight.device:
            raise ValueError(f"{function}: {name} is on {operand.device}, weight on {weight.device}")
