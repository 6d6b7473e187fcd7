"""From raw samples to statements: medians, the interval of a speed-up, and when a measurement decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from slimvlm.serve.profile import FASTER, MEASURED, SAME, SLOWER, TOO_NOISY, Cell, DecoderRun, DecoderTest, Ratio, Run

LEVEL, RESAMPLES = 0.95, 2000
# Of n samples, all lie on one side of the median with probability 2 * 0.5**n: below 6 no 95 % statement is possible.
MIN_ROUNDS = 6
RESOLUTION = 0.01  # what the profiler's own work may change in a median
EQUAL = 0.05  # an interval within 5 % of 1, either way, is no difference
RULE = (
    f"faster or slower: the whole interval ({100 * LEVEL:g} %) of the ratio is more than {100 * RESOLUTION:g} % beyond "
    f"1; same: it lies within {100 * EQUAL:g} % of 1; too noisy: neither, or fewer than {MIN_ROUNDS} rounds"
)


def median(samples: Sequence[float]) -> float:
    """The median.

    Raises:
        ValueError: no samples.
    """
    if not len(samples):
        raise ValueError("a median needs at least one sample")
    return float(np.median(samples))


def paired_ratio(dense: Sequence[float], slim: Sequence[float], seed: int = 0) -> Ratio:
    """median(dense) / median(slim) with a percentile bootstrap over rounds; a round's two samples stay together, so
    what slows both models down cancels out.

    Args:
        dense, slim: seconds, one per round, in the same order.

    Raises:
        ValueError: no rounds, not as many of one as of the other, or a time that is not positive.
    """
    pairs = np.array([dense, slim], dtype=np.float64) if len(dense) == len(slim) else np.empty((2, 0))
    if not pairs.size or not (pairs > 0).all():
        raise ValueError(f"a ratio needs paired positive times; there are {len(dense)} and {len(slim)}")
    rounds = pairs.shape[1]
    draws = np.random.default_rng(seed).integers(rounds, size=(RESAMPLES, rounds))
    medians = np.median(pairs[:, draws], axis=2)
    # Quantiles of the logarithm: swapping the models gives the reciprocal interval.
    logarithms = np.log(medians[0]) - np.log(medians[1])
    low, high = np.exp(np.quantile(logarithms, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    before, after = np.median(pairs, axis=1)
    value = before / after
    low, high = min(low, value), max(high, value)
    return Ratio(float(after), float(before), float(value), float(low), float(high), _relation(low, high, rounds))


def _relation(low: float, high: float, rounds: int) -> str:
    """As RULE says."""
    if rounds < MIN_ROUNDS:
        return TOO_NOISY
    if low > 1 + RESOLUTION:
        return FASTER
    if high < 1 / (1 + RESOLUTION):
        return SLOWER
    return SAME if low >= 1 / (1 + EQUAL) and high <= 1 + EQUAL else TOO_NOISY


def summarize_cell(cell: Cell, seed: int = 0) -> Cell:
    """The cell with medians, tokens per second and ratios computed from its raw samples; unmeasured cells unchanged."""
    if cell.status != MEASURED:
        return cell
    tokens = {"prefill": cell.prompt_tokens, "tpot": 1, "end_to_end": cell.new_tokens, "text": cell.prompt_tokens}
    runs = {
        name: _summarize(run, {phase: cell.batch_size * count for phase, count in tokens.items()})
        for name, run in cell.runs.items()
    }
    return replace(cell, runs=runs, ratios=_ratios(runs, seed))


def _summarize(run: Run, tokens: Mapping[str, int]) -> Run:
    medians = {phase: median(samples) for phase, samples in run.seconds.items()}
    rates = {phase: tokens[phase] / seconds for phase, seconds in medians.items() if tokens.get(phase)}
    return replace(run, medians=medians, tokens_per_second=rates)


def _ratios(runs: Mapping[str, Run], seed: int) -> dict[str, Ratio]:
    if not {"dense", "slim"} <= set(runs):
        return {}
    dense, slim = runs["dense"].seconds, runs["slim"].seconds
    return {phase: paired_ratio(dense[phase], slim[phase], seed) for phase in slim if phase in dense}


def decoder_test(
    what: tuple[str, str, str], tokens: int, rates: Mapping[str, Sequence[float]], seed: int = 0
) -> DecoderTest:
    """A measured decoder test, as llama-bench states it: tokens per second, mean and standard deviation (n - 1).

    Args:
        what: backend, dtype and name (`pp512`).
        rates: model -> tokens per second of every repetition; those of two models are paired.
    """
    runs = {name: _decoder_run(samples) for name, samples in rates.items()}
    ratio = None
    if {"dense", "slim"} <= set(rates):
        dense, slim = ([tokens / rate for rate in rates[name]] for name in ("dense", "slim"))
        ratio = paired_ratio(dense, slim, seed)
    return DecoderTest(*what, tokens, MEASURED, runs=runs, ratio=ratio)


def _decoder_run(rates: Sequence[float]) -> DecoderRun:
    deviation = float(np.std(rates, ddof=1)) if len(rates) > 1 else 0.0
    return DecoderRun(tuple(rates), float(np.mean(rates)), deviation)
