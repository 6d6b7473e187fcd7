"""Which state of a training is kept: the last one that is not measurably worse than a state before it.

A training is scheduled to end well, and a few hundred held-out questions cannot tell its later states apart: which of
them answers most of these is luck. So every state takes over from the one before, the starting one included, unless its
share of right answers or the loss of the right answers falls out of the 95 % interval of an earlier state's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from slimvlm.compress.evaluation.quality import NORMAL_QUANTILE, Quality, wilson

Score = tuple[float, float]  # share of right answers, and minus the loss of the right answers' tokens


class Validation(NamedTuple):
    """What the held-out samples say of a state.

    Attributes:
        score: as measured; larger is better.
        least: the lower ends of the intervals of both.
    """

    score: Score
    least: Score


def validation_of(quality: Quality) -> Validation:
    """From an evaluation on the held-out samples; a dual encoder has no loss, which is 0 then."""
    loss = quality.scores.get("token_loss", 0.0)
    rows = [(row.loss or 0.0, row.tokens or 0) for row in quality.rows]
    error = math.sqrt(sum((summed - tokens * loss) ** 2 for summed, tokens in rows))
    error /= max(1, sum(tokens for _, tokens in rows))
    low, _ = wilson(quality.score, len(rows))
    return Validation((quality.score, -loss), (low, -loss - NORMAL_QUANTILE * error))


def as_good_as(score: Score, least: Score | None) -> bool:
    """Whether a state that scored so is not measurably worse than those with this `least`; None: there are none."""
    return least is None or (score[0] >= least[0] and score[1] >= least[1])


def least_of_both(least: Score | None, other: Score) -> Score:
    """What a state must reach to be as good as the states of either."""
    return other if least is None else (max(least[0], other[0]), max(least[1], other[1]))
