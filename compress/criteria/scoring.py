"""How important a unit is: the loss whose gradients count, and the reduction of what was seen to one score per unit.

UKMP (AAAI 2025): only poorly fitted tokens give gradients; |W * G| is summed over everything a unit owns and divided by
the number of its weights, so heads and channels compare; in the language model the entropy of the angles between tokens
and weight rows multiplies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimvlm.compress.criteria.baselines import magnitudes, random_scores
from slimvlm.compress.criteria.criterion import Criterion
from slimvlm.compress.criteria.entropy import unit_entropy
from slimvlm.compress.criteria.scores import Scores
from slimvlm.compress.criteria.units import unit_sums
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.groups import Group

if TYPE_CHECKING:
    from slimvlm.compress.statistics.calibration import Calibration


def score_groups(
    groups: Sequence[Group],
    criterion: Criterion,
    calibration: Calibration | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
) -> Scores:
    """One score per unit: the mean saliency of the weights it owns (biases and norms have none), times its entropy.

    Query slots are formed here: heads are ranked inside every KV group, slot i holds the i-th lowest of each.

    Args:
        calibration: the statistics; needed unless the criterion is `magnitude` or `random`.
        model: needed for `magnitude` (mean |w|).
        seed: for `random`.

    Raises:
        ValueError: statistics or model missing.
        CalibrationError: a score is not finite.
    """
    if criterion.saliency == "random":
        return random_scores(groups, criterion, seed)
    if criterion.saliency == "magnitude":
        if model is None:
            raise ValueError("the criterion 'magnitude' needs the model")
        saliency: Mapping[str, Tensor] = magnitudes(groups, model)
    elif calibration is None:
        raise ValueError(f"the criterion {criterion.name!r} needs calibration statistics")
    else:
        saliency = calibration.saliency
    values, members = {}, {}
    for group in groups:
        sums, units = unit_sums(group, saliency)
        score = sums / group.weights_per_unit
        if criterion.entropy and calibration is not None and group.modality == "language":
            score = score * unit_entropy(group, calibration.entropy, units)
        if not torch.isfinite(score).all():
            raise CalibrationError(f"the scores of {group.key} are not finite; load the model in float32 or bfloat16")
        values[group.key], members[group.key] = score.float(), units
    return Scores(criterion, values, members)
