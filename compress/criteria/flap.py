"""FLAP: how much what an output projection makes of a unit fluctuates about its mean (An et al., AAAI 2024).

The mean itself can be given to a bias when the unit leaves (the compensation `bias`); what cannot is the variance of
the unit's features, weighed by the squared norms of the weights they are read with. That is standardised over the
features of a group, so that groups compare, and a head is worth the mean of its features. A forward is all it takes.
"""

from __future__ import annotations

from torch import Tensor

from slimvlm.compress.criteria.scoring import Seen, unit_sums
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.projections import Member


def score(group: Group, seen: Seen) -> tuple[Tensor, Tensor]:
    """Means over a unit's features of their standardised fluctuation, and the units."""
    (variances,) = seen.statistics

    def fluctuation(member: Member) -> Tensor:
        weighed = variances[member.path].double() * seen.weight(member).square().sum(0).double().cpu()
        spread = weighed.std()
        return (weighed - weighed.mean()) / spread if spread > 0 else weighed * 0

    sums, units = unit_sums(group, seen, fluctuation, dims=(1,))
    return sums / (units.shape[1] * group.head_dim), units
