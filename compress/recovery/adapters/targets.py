"""Which linears are adapted, and with what ranks. No peft: it takes a second to import."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.options import LowRank


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


def check_ranks(model: nn.Module, paths: Iterable[str], options: LowRank) -> None:
    """Refuse low-rank layers that the linears at `paths` cannot have.

    Raises:
        UnsuitableOptionError: a rank below 1 or larger than its matrix, alpha not positive, dropout outside [0, 1).
    """
    if options.rank < 1 or options.recall_rank < 1:
        raise UnsuitableOptionError(f"ranks must be at least 1, got {options.rank} and {options.recall_rank}")
    if not (math.isfinite(options.alpha) and options.alpha > 0):
        raise UnsuitableOptionError(f"alpha must be a positive number, got {options.alpha}")
    if not 0 <= options.dropout < 1:
        raise UnsuitableOptionError(f"dropout must be at least 0 and below 1, got {options.dropout}")
    for path in paths:
        shape = model.get_parameter(f"{path}.weight").shape
        for what, rank in (("rank", options.rank), ("recall rank", options.recall_rank if options.recall else 1)):
            if rank > min(shape):
                raise UnsuitableOptionError(
                    f"{what} {rank} is larger than {path}, which is {' x '.join(map(str, shape))}; "
                    f"choose at most {min(shape)}, or leave this layer out of the targets"
                )


def _ends(path: str, ending: str) -> bool:
    return path == ending or path.endswith(f".{ending}")
