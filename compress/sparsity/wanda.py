"""Wanda: of every row the weights of least |w| times the norm of what they read (Sun et al., ICLR 2024)."""

from __future__ import annotations

from torch import Tensor

from slimvlm.compress.sparsity.rules import Zeros


def prune(weight: Tensor, norms: Tensor, zeros: Zeros) -> Tensor:
    """`weight` [out, in] with zeros; of equal ones the first goes.

    Args:
        norms: L2 norm over the tokens of every input feature. [in]
    """
    worth = (weight.abs() * norms.to(weight)).view(len(weight), -1, zeros.of or weight.shape[1])
    goes = worth.argsort(dim=-1, stable=True)[..., : zeros.count]
    return weight.view_as(worth).scatter(-1, goes, 0.0).view_as(weight)
