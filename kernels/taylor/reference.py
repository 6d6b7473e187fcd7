"""Plain formulas of the saliency sums; the tests hold every other path against these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from slimvlm.kernels.taylor import Operands


def saliency_sums(batch: Sequence[Operands], variant: str) -> list[Tensor]:
    """fp32[n] per matrix: the saliency of every weight, summed over the dimension other than its `dim`."""
    return [_one(operands, variant) for operands in batch]


def _one(operands: Operands, variant: str) -> Tensor:
    weight, dim = operands.weight.float(), operands.dim
    grad, square = (None if tensor is None else tensor.float() for tensor in (operands.grad, operands.square))
    saliency = weight * cast(Tensor, square if variant == "second" else grad)
    if variant == "second":
        saliency = saliency * weight
    if variant == "mix":
        saliency = saliency - 0.5 * weight * cast(Tensor, square) * weight
    if variant == "fisher":
        return saliency.square().sum(1 - dim)
    if variant == "vectorized":
        return saliency.sum(1 - dim).abs()
    return torch.abs(saliency).sum(1 - dim)
