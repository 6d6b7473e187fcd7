"""Which linears are adapted, and with what ranks. No peft: it takes a second to import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups


@dataclass(frozen=True)
class LowRank:
    """What to train; the defaults are the paper's.

    Attributes:
        rank: r of the plain branch.
        recall_rank: r2 of the recall branch; a layer that lost fewer rows (columns) than this takes their number.
        alpha: s = alpha / rank, for all branches.
        dropout: on the input of the plain branch only.
        recall: whether there is a recall branch.
        targets: endings of module paths (`q_proj`, `mlp.fc1`); empty: every linear of every group of the family.

    Raises:
        UnsuitableOptionError: a rank below 1, alpha not positive, dropout outside [0, 1).
    """

    rank: int = 8
    recall_rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    recall: bool = True
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or self.recall_rank < 1:
            raise UnsuitableOptionError(f"ranks must be at least 1, got {self.rank} and {self.recall_rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UnsuitableOptionError(f"alpha must be a positive number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UnsuitableOptionError(f"dropout must be at least 0 and below 1, got {self.dropout}")


def find_targets(model: nn.Module, attention_unit: str, endings: tuple[str, ...] = ()) -> list[str]:
    """Paths of the linears of the prunable groups, in table order; only those with one of the endings, if any is given.

    Raises:
        UnsuitableOptionError: an ending matches no linear.
    """
    groups = find_groups(model, find_family(model.config), attention_unit)
    paths = list(dict.fromkeys(member.path for group in groups for member in group.members if not member.norm))
    if not endings:
        return paths
    for ending in endings:
        if not any(_ends(path, ending) for path in paths):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            raise UnsuitableOptionError(f"target {ending!r} matches no prunable linear; they end with {known}")
    return [path for path in paths if any(_ends(path, ending) for ending in endings)]


def check_rank(path: str, linear: Any, options: LowRank) -> None:
    """Refuse ranks that the linear at `path` cannot have.

    Raises:
        UnsuitableOptionError: a rank is larger than the matrix.
    """
    side = min(linear.weight.shape)
    for what, rank in (("rank", options.rank), ("recall rank", options.recall_rank if options.recall else 1)):
        if rank > side:
            raise UnsuitableOptionError(
                f"{what} {rank} is larger than {path}, which is {' x '.join(map(str, linear.weight.shape))}; "
                f"choose at most {side}, or leave this layer out of the targets"
            )


def _ends(path: str, ending: str) -> bool:
    return path == ending or path.endswith(f".{ending}")
