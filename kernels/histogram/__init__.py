"""Histogram of the angles between token vectors and weight rows, and its entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from slimvlm.kernels import dispatch
from slimvlm.kernels.histogram import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def angle_histogram(  # noqa: PLR0913 (a kernel's operands)
    outputs: Tensor,
    input_norms: Tensor,
    weight_norms: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    *,
    mask: Tensor | None = None,
    drop_outside: bool = False,
) -> None:
    """Add, per output channel, the histogram of cos(token, weight row) = (y - b) / (|x| |w|) on [-1, 1] to `counts`.

    UKMP section "angle distribution"; the forward pass has made y already, so no second product is needed. Bin i covers
    [-1 + 2 i / bins, -1 + 2 (i + 1) / bins), the last one is closed.

    Args:
        outputs: [T, R], y = W x + b of T tokens.
        input_norms: [T], |x|, bounded below by 1e-12.
        weight_norms: [R], |w|, bounded below by 1e-12.
        bias: [R] or None.
        counts: int64 or int32 [R, bins], added to in place.
        mask: bool [T], True for the tokens that count (padding is False).
        drop_outside: drop values that rounding pushed outside [-1, 1], as the paper's code does; else the end bins
            count them.

    Raises:
        ValueError: shapes, devices or the dtype of `counts` do not fit, or (seen where torch counts; a Triton kernel
            does not wait for an answer and leaves NaN uncounted) the outputs hold NaN.
    """
    if outputs.ndim != 2:
        raise ValueError(f"angle_histogram: outputs must be [tokens, channels], got shape {tuple(outputs.shape)}")
    if counts.dtype not in (torch.int64, torch.int32) or counts.ndim != 2 or counts.shape[1] == 0:
        raise ValueError(
            f"angle_histogram: counts must be int64 or int32 [rows, bins] for outputs {tuple(outputs.shape)}, "
            f"got {counts.dtype} {tuple(counts.shape)}"
        )
    tokens, rows = outputs.shape
    operands: dict[str, tuple[Tensor | None, int]] = {
        "input_norms": (input_norms, tokens),
        "weight_norms": (weight_norms, rows),
    }
    operands |= {"bias": (bias, rows), "mask": (mask, tokens), "counts": (counts[:, 0], rows)}
    for name, (operand, length) in operands.items():
        if operand is None:
            continue
        if tuple(operand.shape) != (length,):
            raise ValueError(
                f"angle_histogram: {name} {tuple(operand.shape)} does not fit outputs {tuple(outputs.shape)}; "
                f"expected length {length}"
            )
        if operand.device != outputs.device:
            raise ValueError(f"angle_histogram: {name} is on {operand.device}, outputs on {outputs.device}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"angle_histogram: mask must be bool, got {mask.dtype}")
    floating = (outputs, input_norms, weight_norms, bias)
    path = dispatch.choose("histogram", *floating, dtypes=DTYPES)
    path.angle_histogram(outputs, (input_norms, weight_norms), bias, counts, mask, drop_outside)


def histogram_entropy(counts: Tensor) -> Tensor:
    """Shannon entropy of every row of counts [R, bins], fp32[R] in nats, 0 .. ln(bins); 0 for a row without counts.

    Raises:
        ValueError: counts is not a matrix.
    """
    if counts.ndim != 2:
        raise ValueError(f"histogram_entropy: counts must be [rows, bins], got shape {tuple(counts.shape)}")
    return reference.histogram_entropy(counts)
