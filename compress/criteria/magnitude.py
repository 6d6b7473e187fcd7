"""The size of the weights: a unit is worth the sum of |w| (for filters: Li et al., ICLR 2017). Needs no data."""

from __future__ import annotations

from torch import Tensor

from slimvlm.compress.criteria.scoring import Seen, unit_sums
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.projections import Member


def score(group: Group, seen: Seen) -> tuple[Tensor, Tensor]:
    """Sums of |w|, and the units."""

    def sizes(member: Member) -> Tensor:
        return seen.weight(member).abs().sum(1 - member.dim).cpu()

    return unit_sums(group, seen, sizes)
