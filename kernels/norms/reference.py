"""Plain formula of the row norms."""

from __future__ import annotations

from torch import Tensor


def row_norms(matrix: Tensor) -> Tensor:
    """fp32[T]: square root of the sum of squares."""
    return matrix.float().square().sum(1).sqrt()
