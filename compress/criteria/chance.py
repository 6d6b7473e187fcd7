"""Chance: uniform in [0, 1), the same for the same seed. What any criterion must beat. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from slimvlm.compress.criteria.scoring import Seen, units_of
from slimvlm.compress.models.groups import Group


def score(group: Group, seen: Seen) -> tuple[Tensor, Tensor]:
    """Random values, and units whose heads met by chance."""
    values = torch.rand(group.num_units, generator=seen.generator)
    return values, units_of(group, torch.rand(group.size, generator=seen.generator))
