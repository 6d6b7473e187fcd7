"""Plan in rounds: calibrate, score and cut a little, then look again at the model that is left.

Scores of a dense model say little about a half-cut one (research: with re-calibration the cliff moves from about 48 % to
about 60 % removed). The ratio grows as target * (1 - (1 - i/R)^1.5): large steps while the model is whole, small ones
near the end. One round is the paper's one-shot plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from slimvlm.compress.budget import Budget, Facts, make_plan
from slimvlm.compress.calibrate import Calibration, CalibrationOptions, collect
from slimvlm.compress.criteria import Scores, score_groups
from slimvlm.compress.families import Family
from slimvlm.compress.groups import count_parameters, find_groups
from slimvlm.compress.plan import Plan
from slimvlm.compress.slicing import apply_plan

SCHEDULE_POWER = 1.5
DATA_FREE = ("magnitude", "random")  # saliencies that look at no sample


@dataclass(frozen=True)
class Planning:
    """How a plan is made: the budget on the dense model, the calibration, and how often it is repeated."""

    budget: Budget
    calibration: CalibrationOptions
    rounds: int = 1
    attention_unit: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Planned:
    """The composed plan, with the scores and statistics of its last round."""

    plan: Plan
    scores: Scores
    calibration: Calibration | None


def round_ratio(target: float, index: int, rounds: int) -> float:
    """Removed fraction after round `index` (1-based) of `rounds`; the last one is the target exactly."""
    return target if index == rounds else target * (1 - (1 - index / rounds) ** SCHEDULE_POWER)


def plan_in_rounds(
    model: nn.Module,
    family: Family,
    batches: Callable[[int], Iterable[Mapping[str, Any]]],
    planning: Planning,
    *,
    done: tuple[int, Plan] | None = None,
    on_round: Callable[[int, Planned], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Planned:
    """Decide what to cut from the dense `model`; the model is left partly cut (all but the last round are applied to it).

    Args:
        batches: calibration batches of a round (0-based), with labels.
        done: (round, composed plan) of an interrupted run; the model must still be dense.
        on_round: called after every round with its 1-based number and the composed plan.
    """
    dense = _facts(model, family, find_groups(model, family, planning.attention_unit))
    composed = None
    first = 0
    if done is not None:
        first, composed = done
        apply_plan(model, composed)
    planned = None
    for index in range(first, planning.rounds):
        groups = find_groups(model, family, planning.attention_unit)
        calibration = None
        if planning.calibration.criterion.saliency not in DATA_FREE:
            calibration = collect(model, family, groups, batches(index), planning.calibration, progress)
        scores = score_groups(groups, planning.calibration.criterion, calibration, model, planning.seed)
        budget = _budget_of_round(planning, dense, _facts(model, family, groups), index + 1)
        later = make_plan(groups, scores, budget, _facts(model, family, groups))
        composed = later if composed is None else composed.compose(later)
        planned = Planned(composed, scores, calibration)
        if on_round is not None:
            on_round(index + 1, planned)
        if index + 1 < planning.rounds:
            apply_plan(model, later)
    return planned
