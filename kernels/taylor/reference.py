"""Plain formulas of the saliency sums; the tests hold every other path against these."""

from __future__ import annotations

import torch
from torch import Tensor


def saliency_sums(weight: Tensor, grad: Tensor | None, dim: int, variant: str, square: Tensor | None) -> Tensor:
    """fp32[n]: the saliency of every weight, summed over the dimension other than `dim`."""
    weight = weight.float()
    if variant in ("second", "mix"):
        saliency = weight * square.float() * weight
    else:
        saliency = weight * grad.float()
    if variant == "mix":
        saliency = weight * grad.float() - 0.5 * saliency
    if variant == "fisher":
        return saliency.square().sum(1 - dim)
    if variant == "vectorized":
        return saliency.sum(1 - dim).abs()
    return torch.abs(saliency).sum(1 - dim)
