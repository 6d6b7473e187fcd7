"""How many zeros every linear gets: the asked share of the whole model, by groups, to about half a row of a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from torch import nn

from slimvlm.compress.allocate.rules.ecoflap import BEYOND, water_filling
from slimvlm.compress.errors import InfeasibleBudgetError, UnsuitableOptionError
from slimvlm.compress.models.groups import Group, count_parameters
from slimvlm.compress.sparsity.rules import Zeros

MOST = 0.9  # of a group, unless more is asked of all: what is left must still compute something


def linears_of(model: nn.Module, group: Group) -> dict[str, nn.Linear]:
    """Path -> linear, of the matrices of a group."""
    paths = [member.path for member in group.members if not member.norm]
    return {path: cast(nn.Linear, model.get_submodule(path)) for path in paths}


def patterned_zeros(model: nn.Module, groups: Sequence[Group], pattern: tuple[int, int]) -> dict[str, Zeros]:
    """The same of every linear.

    Raises:
        UnsuitableOptionError: a width is no multiple of the pattern's.
    """
    count, of = pattern
    found = {path: linear for group in groups for path, linear in linears_of(model, group).items()}
    for path, linear in found.items():
        if linear.weight.shape[1] % of:
            raise UnsuitableOptionError(
                f"--sparsity {count}:{of} takes {count} of every {of} neighbours in a row, and {path} reads "
                f"{linear.weight.shape[1]} features, no multiple of {of}; use --sparsity unstructured"
            )
    return dict.fromkeys(found, Zeros(count, of))


def zeros_of(
    model: nn.Module, groups: Sequence[Group], ratio: float, importance: Mapping[str, float] | None
) -> dict[str, Zeros]:
    """Zeros per row of every linear, so that `ratio` of ALL parameters become zero.

    Args:
        importance: of groups, by which ECoFLaP's water-filling shares out what is kept; None: the same of all.

    Raises:
        InfeasibleBudgetError: the linears hold too little.
    """
    linears = [linears_of(model, group) for group in groups]
    sizes = np.array([sum(one.weight.numel() for one in inside.values()) for inside in linears])
    target = ratio * count_parameters(model)
    sparsity = target / sizes.sum()
    if sparsity >= 1:
        raise InfeasibleBudgetError(
            f"ratio {ratio:g} cannot be reached: the linears of attentions and MLPs hold "
            f"{sizes.sum() / count_parameters(model):.4f} of all parameters; ask for less than that"
        )
    kept = sizes * (1 - sparsity)
    if importance is not None:
        cap = max(sparsity, min(MOST, sparsity + BEYOND))
        worth = np.array([importance[group.key] for group in groups])
        kept = water_filling(sizes, worth, sparsity, cap).astype(np.float64)
    wanted = {
        path: (1 - share) * linear.weight.shape[1]
        for inside, share in zip(linears, kept / sizes, strict=True)
        for path, linear in inside.items()
    }
    rows = {path: linear.weight.shape[0] for inside in linears for path, linear in inside.items()}
    counts = {path: math.floor(exact) for path, exact in wanted.items()}
    rest = target - sum(count * rows[path] for path, count in counts.items())
    for path in sorted(wanted, key=lambda path: counts[path] - wanted[path]):  # largest fraction first
        if rest >= rows[path] / 2:
            counts[path] += 1
            rest -= rows[path]
    return {path: Zeros(count) for path, count in counts.items()}
