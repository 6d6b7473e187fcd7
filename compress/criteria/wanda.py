"""Wanda-sp: what an output projection reads and weighs of a unit, sum of |w| |x| (An et al., FLAP, AAAI 2024).

Wanda (Sun et al., ICLR 2024) scores a weight by |w| times the L2 norm of its input feature over the tokens. Wanda-sp
adds these up over the columns of the output projection that a channel or head feeds. A forward is all it takes. Sums
differ by layer, so groups are compared after division by their means.
"""

from __future__ import annotations

from torch import Tensor

from slimvlm.compress.criteria.scoring import Seen, unit_sums
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.projections import Member


def score(group: Group, seen: Seen) -> tuple[Tensor, Tensor]:
    """Sums over the columns of the output projection, and the units."""
    (norms,) = seen.statistics

    def worth(member: Member) -> Tensor:
        return seen.weight(member).abs().sum(0).cpu() * norms[member.path]

    return unit_sums(group, seen, worth, dims=(1,))
