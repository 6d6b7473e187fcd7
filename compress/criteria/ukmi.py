"""UKMI's second factor: the entropy of the angles between tokens and the weight rows of a unit (UKMP, AAAI 2025)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimvlm.compress.criteria.units import _own, rows_of
from slimvlm.compress.models.groups import Group


def unit_entropy(group: Group, entropy: Mapping[str, Tensor], units: Tensor) -> Tensor:
    """Mean over the row-cut matrices a unit has a part in, of the mean entropy of its rows there: fp64 [num_units]."""
    means = []
    for member in group.members:
        if member.norm or member.dim != 0:
            continue
        rows = rows_of(group, member, entropy[member.path]).mean(1)
        if _own(member):
            means.append(rows[units].mean(1))
        elif group.unit != "query-slot":
            means.append(rows)
    return torch.stack(means).mean(0)
