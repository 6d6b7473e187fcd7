"""Saliency of a linear's rows or columns from its weight and accumulated gradient."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from slimvlm.kernels.taylor import cpu, reference

VARIANTS = ("first", "vectorized", "second", "mix")


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
    if variant not in VARIANTS:
        raise ValueError(f"taylor_sums: variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    needed = {"second": {"square": square}, "mix": {"grad": grad, "square": square}}.get(variant, {"grad": grad})
    _check("taylor_sums", weight, dim, needed)
    grad = needed.get("grad")
    return _path(weight).saliency_sums(weight, grad, dim, variant, needed.get("square"))


def squared_sums(weight: Tensor, grad: Tensor, dim: int) -> Tensor:
    """Sum of (w * g)^2 over the other dimension, fp32[weight.shape[dim]]: diagonal Fisher, to be added per micro-batch.

    Raises:
        ValueError: unknown dim, or shapes or devices that differ.
    """
    _check("squared_sums", weight, dim, {"grad": grad})
    return _path(weight).saliency_sums(weight, grad, dim, "fisher", None)


def _path(weight: Tensor) -> ModuleType:
    return cpu if weight.device.type == "cpu" else reference


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
