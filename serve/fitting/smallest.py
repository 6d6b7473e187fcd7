"""The smallest artefact that loses no more than may be lost: whole models in every precision, then cuts of them.

What is lost is measured before any training, which wins some of it back: minutes of search instead of a training per
candidate, and a cut with room to spare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from slimvlm.serve.fitting.goals import DROP, WITHIN, Goal
from slimvlm.serve.fitting.record import Trial
from slimvlm.serve.fitting.search import Foretell, Found, Try, find_whole

STEP = 0.02  # of all parameters: how closely the largest cut is looked for
WORTHWHILE = 1 - WITHIN  # of the bytes of the smallest whole model: nothing is cut for less


def find_smallest(bound: Goal, backends: Sequence[str], try_out: Try, foretell: Foretell, most: float) -> Found:
    """The candidate with the fewest bytes of those that lose at most `bound`.

    Of the smallest precision that is within the bound by itself, the largest cut that still is, by halving. Of another
    one only cuts that would be smaller, and none that is known to lose too much in any precision.

    Args:
        backends: the precisions that may be delivered, the most exact one first.
        try_out: gives the figures `size` and `drop`.
        foretell: what a cut leaves of the size, up to a factor.
        most: the largest ratio that may be cut.

    Raises:
        InfeasibleBudgetError: every precision alone loses more.
    """
    tried = list(find_whole((bound,), backends, try_out).trials)
    able = sorted((trial for trial in tried if bound.is_met(trial.figures[DROP])), key=_bytes)
    best, enough = able[0], WORTHWHILE * _bytes(able[0])
    too_much = math.inf  # the smallest cut that is known to lose more than the bound, its precision apart

    def holds(ratio: float, whole: Trial) -> bool:
        nonlocal best, too_much
        trial = try_out(ratio, whole.backend)
        tried.extend([trial] if trial not in tried else [])
        met = bound.is_met(trial.figures[DROP])
        if met and _bytes(trial) < min(_bytes(best), enough):
            best = trial
        if trial.figures[DROP] - max(whole.figures[DROP], 0.0) > bound.amount:
            too_much = min(too_much, ratio)
        return met

    for whole in able:
        low = _needed(whole, best, foretell, most)
        if low > min(most, too_much) or (low > 0 and not holds(low, whole)):
            continue
        high = min(most, too_much)
        while high - low > STEP:
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle, whole) else (low, middle)
        if high == most:
            holds(most, whole)
    return Found(best, tuple(tried))


def _needed(whole: Trial, best: Trial, foretell: Foretell, most: float) -> float:
    """The smallest ratio of a precision at which it is smaller than the best so far; infinity where none is."""
    if _bytes(whole) <= _bytes(best):
        return 0.0
    ratios = np.linspace(0.0, most, 101).tolist()
    left = [foretell(ratio)["size"] for ratio in ratios]
    share = _bytes(best) / _bytes(whole)
    return min((ratio for ratio, size in zip(ratios, left, strict=True) if size < share * left[0]), default=math.inf)


def _bytes(trial: Trial) -> float:
    return trial.figures["size"]
