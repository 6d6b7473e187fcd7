"""From what was seen to one score per unit, comparable over groups; what is one criterion's own is in its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimvlm.compress.criteria.criterion import Criterion
from slimvlm.compress.criteria.scores import Scores
from slimvlm.compress.criteria.ukmi import unit_entropy
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.groups import Group, Member
from slimvlm.compress.statistics.collect import Calibration


@dataclass(frozen=True)
class Seen:
    """What a criterion judges the groups of one model by.

    Attributes:
        statistics: what was collected for it, in the order it named them.
        model: None: no criterion may look at its weights.
        generator: for chance.
    """

    statistics: Sequence[Mapping[str, Tensor]]
    model: nn.Module | None
    generator: torch.Generator

    def weight(self, member: Member) -> Tensor:
        """The tensor that has `member`, fp32.

        Raises:
            ValueError: there is no model.
        """
        if self.model is None:
            raise ValueError("this criterion needs the model")
        return self.model.get_parameter(f"{member.path}.weight").detach().float()


Score = Callable[[Group, Seen], tuple[Tensor, Tensor]]
NORMALISED: Mapping[str | None, Callable[[Group, Tensor], Tensor]] = {
    None: lambda _, values: values,
    "weights": lambda group, values: values / group.weights_per_unit,
    "mean": lambda _, values: values / values.mean().clamp(min=torch.finfo(values.dtype).tiny),
}


def score_groups(
    groups: Sequence[Group],
    criterion: Criterion,
    calibration: Calibration | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
) -> Scores:
    """One score per unit (biases and norms have none), normalised as the criterion says.

    Query slots are formed here: heads are ranked inside every KV group, slot i holds the i-th lowest of each.

    Args:
        calibration: the statistics; needed unless the criterion looks at no data.
        model: needed where it looks at the weights.
        seed: for `random`.

    Raises:
        ValueError: statistics or model missing.
        CalibrationError: a score is not finite.
    """
    statistics = calibration.seen if calibration is not None else {}
    if missing := [name for name in criterion.calibration().statistics if name not in statistics]:
        raise ValueError(f"the criterion {criterion.name!r} needs calibration statistics: {', '.join(missing)}")
    seen = Seen([statistics[name] for name in criterion.statistics], model, torch.Generator().manual_seed(seed))
    values, members = {}, {}
    for group in groups:
        score, units = criterion.score(group, seen)
        score = NORMALISED[criterion.normalise](group, score)
        if criterion.angles and group.modality == "language":
            score = score * unit_entropy(group, statistics[criterion.angles], units)
        if not torch.isfinite(score).all():
            raise CalibrationError(f"the scores of {group.key} are not finite; load the model in float32 or bfloat16")
        values[group.key], members[group.key] = score.float(), units
    return Scores(criterion, values, members)
