"""Block influence: how far a whole block turns the residual stream (Men et al., ShortGPT, 2024).

1 - cos(what goes into the block, what comes out), per token in fp32, averaged over the tokens that count. A forward is
all it takes. A block that hardly turns its tokens can leave. The angle has one scale, so towers are compared as they
are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimvlm.compress.criteria.scoring import Seen, units_of
from slimvlm.compress.models.groups import Group


def score(group: Group, seen: Seen) -> tuple[Tensor, Tensor]:
    """The mean of every block that may leave, and its number."""
    (turning,) = seen.statistics
    values = torch.cat([turning[path] for path in group.block_paths])
    return values, units_of(group, values)
