"""What needs no data: the size of the weights, and chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimvlm.compress.criteria.criterion import Criterion
from slimvlm.compress.criteria.scores import Scores
from slimvlm.compress.criteria.units import units_of
from slimvlm.compress.models.groups import Group

if TYPE_CHECKING:
    pass


def magnitudes(groups: Sequence[Group], model: nn.Module) -> dict[str, Tensor]:
    """Sums of |w| over the rows or columns of every scored weight: fp32 vectors keyed `path:dim`."""
    sums = {}
    for member in (member for group in groups for member in group.members if not member.norm):
        weight = model.get_parameter(f"{member.path}.weight").detach()
        sums[f"{member.path}:{member.dim}"] = weight.abs().sum(1 - member.dim, dtype=torch.float32).cpu()
    return sums


def random_scores(groups: Sequence[Group], criterion: Criterion, seed: int) -> Scores:
    """Uniform in [0, 1), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    values, members = {}, {}
    for group in groups:
        values[group.key] = torch.rand(group.num_units, generator=generator)
        members[group.key] = units_of(group, torch.rand(group.size, generator=generator))
    return Scores(criterion, values, members)
