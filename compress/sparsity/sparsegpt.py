"""SparseGPT: what the remaining weights of a row can make up for becomes zero (Frantar, Alistarh, ICML 2023).

Columns are taken one after the other. A weight that becomes zero leaves an error in the row's outputs, and the weights
of later columns are moved so as to take back as much of it as they can: the least squares of optimal brain surgery.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.sparsity.rules import Zeros

DAMPING = 0.01  # of the mean of the diagonal
COLUMNS = 128  # whose zeros are chosen together
TRIES = 5  # of a damping ten times as large, where rounding left the products no positive matrix


def prune(weight: Tensor, products: Tensor, zeros: Zeros, damping: float = DAMPING, columns: int = COLUMNS) -> Tensor:
    """`weight` [out, in] with zeros, and the others moved.

    Features that are always 0 read nothing: their weights become zero first. Of `zeros` of whole rows each block of
    `columns` gets its part, in whichever rows; the published code takes one more of each.

    Args:
        products: sum over the tokens of x x^T. [in, in]
        damping: is added to the diagonal, as a part of its mean.

    Raises:
        CalibrationError: the products are not finite, or of no positive matrix.
    """
    weight, products = weight.clone(), products.double()
    dead = products.diagonal() == 0
    products[dead, dead] = 1
    weight[:, dead] = 0
    upper = _inverse_root(products, damping).to(weight)
    rows, width = weight.shape
    gone = 0
    for start in range(0, width, columns):
        end = min(start + columns, width)
        asked = Zeros(round(rows * zeros.count * end / width) - gone) if zeros.of is None else zeros
        gone += asked.count
        errors = _take(weight[:, start:end], upper[start:end, start:end], asked)
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


def _take(block: Tensor, upper: Tensor, zeros: Zeros) -> Tensor:
    """Make zeros in a block of columns, in place; the errors that later columns are to take back. [out, columns]."""
    scale, errors = upper.diagonal(), torch.zeros_like(block)
    goes = torch.zeros_like(block, dtype=torch.bool)
    if zeros.of is None:
        goes.view(-1)[(block / scale).square().flatten().argsort(stable=True)[: zeros.count]] = True
    for column in range(block.shape[1]):
        if zeros.of is not None and column % zeros.of == 0:
            near = slice(column, column + zeros.of)
            lowest = (block[:, near] / scale[near]).square().argsort(dim=1, stable=True)[:, : zeros.count]
            goes[:, near] = goes[:, near].scatter(1, lowest, True)
        kept = block[:, column].masked_fill(goes[:, column], 0)
        errors[:, column] = (block[:, column] - kept) / scale[column]
        block[:, column:] -= errors[:, column, None] * upper[column, column:]
        block[:, column] = kept
    return errors


def _inverse_root(products: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U the inverse of the damped products, fp64."""
    if not products.isfinite().all():
        raise CalibrationError("the inputs of a linear are not finite; check the data, or load the model in float32")
    mean = products.diagonal().mean()
    for attempt in range(TRIES):
        added = damping if attempt == 0 else max(damping, DAMPING) * 10**attempt
        damped = products + added * mean * torch.eye(len(products), dtype=products.dtype, device=products.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: Tensor = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True).L
            if upper.isfinite().all():
                return upper
    raise CalibrationError("the inputs of a linear have no inverse, whatever is added to it; check the data")
