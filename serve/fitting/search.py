"""The closed loop: the smallest cut, in the precision that needs the least of it, that meets every target of cost.

The whole model is tried first, in every precision. What a cut costs is foretold (by a table of times, or by its
parameters), then tried, and what was found corrects the next prophecy, until the tightest target is met and hardly
anything less would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimvlm.compress.errors import InfeasibleBudgetError, UnsuitableOptionError
from slimvlm.serve.fitting.goals import DROP, WITHIN, Goal, split_goals
from slimvlm.serve.fitting.record import Figures, Trial

MOST_TRIALS = 6  # of one precision
FINEST = 0.004  # of all parameters: cuts that lie nearer than this are one
HOPELESS = 1.1  # of a target, foretold of another precision: it is not tried
AIM = 0.985  # of a target is asked of the next trial: in the middle of what is accepted

Foretell = Callable[[float], Figures]  # ratio -> what its cut will cost, up to a factor per quantity
Try = Callable[[float, str], Trial]  # ratio, backend


@dataclass(frozen=True, slots=True)
class Found:
    """What meets the targets, and all that was tried for it; `trial.ratio` 0: nothing needs to be cut."""

    trial: Trial | None
    trials: tuple[Trial, ...]


def find_whole(goals: Sequence[Goal], backends: Sequence[str], try_out: Try) -> Found:
    """The whole model in every precision, up to the first that meets the targets; `trial` None where none does.

    Args:
        goals: each at most once; a bound on the loss is one of them where a cost is.
        backends: the precisions that may be delivered, the most exact one first.

    Raises:
        UnsuitableOptionError: a target that this model or device has no figure for.
        InfeasibleBudgetError: every precision alone loses more than may be lost.
    """
    costs, bound = split_goals(goals)
    tried: list[Trial] = []
    for backend in backends:
        tried.append(try_out(0.0, backend))
        _require_figures(goals, tried[-1])
        if costs and _meets(goals, tried[-1]):
            return Found(tried[-1], tuple(tried))
    if bound and not _within(bound, tried):
        raise InfeasibleBudgetError(_too_lossy(bound, tried))
    return Found(None, tuple(tried))


def find_cut(
    goals: Sequence[Goal], backends: Sequence[str], try_out: Try, foretell: Mapping[str, Foretell], most: float
) -> Found:
    """The candidate to deliver, by targets of cost.

    Rounding weights loses far less than cutting them away, so the backend that needs the smallest cut is taken, of
    those that need none the first. A backend that loses more than may be lost without any cut is left out; what the cut
    loses is not looked at, for the training wins back much of it.

    Args:
        goals, backends: as of `find_whole`.
        foretell: by backend.
        most: the largest ratio that may be cut.

    Raises:
        InfeasibleBudgetError: not even the largest cut meets them; the message says what it reaches.
        UnsuitableOptionError: a target that this model or device has no figure for.
    """
    whole = find_whole(goals, backends, try_out)
    if whole.trial is not None:
        return whole
    costs, bound = split_goals(goals)
    tried = list(whole.trials)
    dense = sorted(_within(bound, tried), key=lambda trial: worst(costs, trial.figures)[1])  # the nearest need least
    best: Trial | None = None
    for trial in dense:
        # Of another precision it is only asked whether it needs less than the best one so far.
        limit = most if best is None else best.ratio - FINEST
        if best is not None and _is_hopeless(costs, trial, foretell[trial.backend], limit):
            continue
        known = _search(costs, [trial], try_out, foretell[trial.backend], limit)
        tried += known[1:]
        best = min((one for one in (best, *known) if one and _meets(costs, one)), key=_cut, default=None)
    if best is None:
        raise InfeasibleBudgetError(_unreachable(costs, tried, most))
    return Found(best, tuple(tried))


def worst(goals: Sequence[Goal], figures: Figures) -> tuple[Goal, float]:
    """The goal that is missed most, or met least, and the figure as a share of it, counted from what is accepted."""
    return max(
        ((goal, goal.excess(figures[goal.name]) / (1 + goal.quantity.slack)) for goal in goals), key=lambda one: one[1]
    )


def _search(goals: Sequence[Goal], known: list[Trial], try_out: Try, foretell: Foretell, most: float) -> list[Trial]:
    """`known`, of one backend, and what was tried after it."""
    backend = known[0].backend
    while len(known) < MOST_TRIALS:
        fails = max((trial.ratio for trial in known if not _meets(goals, trial)), default=0.0)
        meets = min((trial.ratio for trial in known if _meets(goals, trial)), default=None)
        if meets is not None and (meets - fails <= FINEST or _is_tight(goals, known, meets)):
            break
        if meets is None and fails >= most - FINEST:
            break
        ratio = _next(goals, known, foretell, (fails, most if meets is None else meets))
        known = [*known, try_out(ratio, backend)]
    return known


def _is_hopeless(goals: Sequence[Goal], whole: Trial, foretell: Foretell, ratio: float) -> bool:
    """Whether a cut misses a target by a tenth even if all that the `whole` model costs shrinks with what is left."""
    before, after = foretell(0.0), foretell(ratio)
    return any(
        whole.figures[goal.name] * after[goal.name] / before[goal.name] > HOPELESS * goal.amount for goal in goals
    )


def _next(goals: Sequence[Goal], known: Sequence[Trial], foretell: Foretell, between: tuple[float, float]) -> float:
    """The smallest ratio that is foretold to meet the targets, well inside what is not known yet."""
    low, high = between
    ratios = {trial.ratio for trial in known}
    told = [foretell(trial.ratio) for trial in known]
    curves = {
        goal.name: sorted((one[goal.name], trial.figures[goal.name]) for one, trial in zip(told, known, strict=True))
        for goal in goals
    }

    def meets(ratio: float) -> bool:
        figures = foretell(ratio)
        return all(_along(curves[goal.name], figures[goal.name]) <= _aim(goal) * goal.amount for goal in goals)

    if high not in ratios and not meets(high):
        return high  # and if that fails nothing meets them
    first, last = low, high
    while last - first > FINEST / 4:
        middle = (first + last) / 2
        first, last = (first, middle) if meets(middle) else (middle, last)
    if len(known) == 1 and last > high / 2 and any(goal.quantity.slack for goal in goals):
        return high  # where some of the time is not of multiplications, more is needed, or nothing will do
    inside = min(FINEST, (high - low) / 4)
    return float(np.clip(last, low + inside, high if high not in ratios else high - inside))


def _along(curve: Sequence[tuple[float, float]], told: float) -> float:
    """What is measured where so much is foretold: linear between what is known, and below it; of one alone in
    proportion. So two tell what costs the same at every width.
    """
    if len(curve) == 1:
        return curve[0][1] * told / curve[0][0]
    (first, at_first), (second, at_second) = curve[:2]  # those with least
    if told < first < second:
        return at_first - (at_second - at_first) / (second - first) * (first - told)
    return float(np.interp(told, [one for one, _ in curve], [value for _, value in curve]))


def _aim(goal: Goal) -> float:
    """What is counted exactly is asked for exactly; where it is measured, its middle is aimed at."""
    return AIM if goal.quantity.slack else 1 - WITHIN / 6


def _is_tight(goals: Sequence[Goal], known: Sequence[Trial], ratio: float) -> bool:
    """Whether a trial that meets the targets uses the tightest of them to all but 3 %."""
    trial = next(trial for trial in known if trial.ratio == ratio)
    return max(goal.excess(trial.figures[goal.name]) for goal in goals) >= 1 - WITHIN


def _meets(goals: Sequence[Goal], trial: Trial) -> bool:
    return all(goal.is_met(trial.figures[goal.name]) for goal in goals)


def _within(bound: Goal | None, whole: Sequence[Trial]) -> list[Trial]:
    """The precisions that do not lose more than may be lost by themselves."""
    return [trial for trial in whole if bound is None or bound.is_met(trial.figures[DROP])]


def _cut(trial: Trial) -> float:
    return trial.ratio


def _require_figures(goals: Sequence[Goal], trial: Trial) -> None:
    if missing := [goal for goal in goals if goal.name not in trial.figures]:
        known = ", ".join(name for name in trial.figures)
        raise UnsuitableOptionError(
            f"--target {missing[0].name}: this model has no such figure on this device; it has {known}"
        )


def _too_lossy(bound: Goal, whole: Sequence[Trial]) -> str:
    least = min(whole, key=lambda trial: trial.figures[DROP])
    return (
        f"--target {bound} cannot be met: of --variants {least.backend} loses least, "
        f"{bound.quantity.words(least.figures[DROP])} with nothing removed; ask for that, or add a more exact precision"
    )


def _unreachable(goals: Sequence[Goal], tried: Sequence[Trial], most: float) -> str:
    nearest = min(tried, key=lambda trial: worst(goals, trial.figures)[1])
    goal, _ = worst(goals, nearest.figures)
    reached = goal.quantity.words(nearest.figures[goal.name])
    return (
        f"--target {goal} cannot be met: the best that was found is {reached}, with {nearest.ratio:.0%} of the "
        f"parameters removed in {nearest.backend}; ask for that, raise --ratio ({most:g} is the most it may remove), "
        "or add a precision to --variants"
    )
