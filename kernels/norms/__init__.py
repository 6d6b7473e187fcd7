"""Euclidean lengths of tokens and of weight rows, the divisors of the angle histogram."""

from __future__ import annotations

import torch
from torch import Tensor

from slimvlm.kernels import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def row_norms(matrix: Tensor) -> Tensor:
    """|row| of a matrix [T, C], fp32[T], squares added up in fp32; computed once for linears that read one input.

    Args:
        matrix: any floating dtype and strides.

    Raises:
        ValueError: not a matrix of floating numbers.
    """
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError(
            f"row_norms: needs a matrix of floating numbers, got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    norms: Tensor = dispatch.choose("norms", matrix, dtypes=DTYPES).row_norms(matrix)
    return norms
