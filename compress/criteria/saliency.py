"""A saliency that was collected weight by weight: a unit is worth the sum of all its weights.

`taylor` sums |w g|, the first-order change of the loss without the weight, `fisher` its squares over batches, `gate`
the squares of the loss's derivative by a unit's gate. The sums are made while the data is read (gradients and gates of
statistics/collectors); here they become units.
"""

from __future__ import annotations

from torch import Tensor

from slimvlm.compress.criteria.scoring import Seen, unit_sums
from slimvlm.compress.models.groups import Group


def score(group: Group, seen: Seen) -> tuple[Tensor, Tensor]:
    """Sums of the criterion's own statistic, and the units."""
    (saliency,) = seen.statistics
    return unit_sums(group, seen, lambda member: saliency[f"{member.path}:{member.dim}"])
