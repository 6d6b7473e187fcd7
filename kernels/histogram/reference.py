"""Plain formulas of the angle histogram and its entropy; the tests hold every other path against them."""

from __future__ import annotations

import torch
from torch import Tensor

NORM_FLOOR = 1e-12


def angle_histogram(
    outputs: Tensor,
    norms: tuple[Tensor, Tensor],
    bias: Tensor | None,
    counts: Tensor,
    mask: Tensor | None,
    drop_outside: bool,
) -> None:
    """Channel by channel; `norms` are those of (inputs [T], weight rows [R]), `mask` [T] is True for what counts."""
    bins = counts.shape[1]
    lengths, widths = (norm.float().clamp_min(NORM_FLOOR) for norm in norms)
    if mask is not None:
        outputs, lengths = outputs[mask], lengths[mask]
    for row in range(counts.shape[0]):
        product = outputs[:, row].float() - (0 if bias is None else bias[row].float())
        cosine = product / (lengths * widths[row])
        if drop_outside:
            cosine = cosine[cosine.abs() <= 1]
        index = ((cosine + 1) / 2 * bins).floor().clamp(0, bins - 1).long()
        counts[row] += torch.bincount(index, minlength=bins)


def histogram_entropy(counts: Tensor) -> Tensor:
    """fp32[R] in nats; a row without counts has entropy 0."""
    share = counts.double()
    share /= share.sum(1, keepdim=True).clamp_min(1)
    return -(share * (share + 1e-12).log()).sum(1).float()
