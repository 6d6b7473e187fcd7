"""From raw samples to statements: medians, the interval of a speed-up, and when a measurement decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from slimvlm.serve.profile import FASTER, MEASURED, SAME, SLOWER, TOO_NOISY, Cell, DecoderRun, DecoderTest, Ratio, Run

LEVEL, RESAMPLES = 0.95, 2000
# Of n samples, all lie on one side of the median with probability 2 * 0.5**n: below 6 no 95 % statement is possible.
MIN_ROUNDS = 6
# A process keeps its memory layout and cores for as long as it lives: rounds of one say nothing of the next.
MIN_STARTS = 3
NORMAL = 1.95996  # quantile of the normal distribution at LEVEL, two-sided
WIDEST = 12.0  # of an interval, as a logarithm to either side: a factor of 160,000
STUDENT = (4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216)  # 2 to 9 degrees of freedom
RESOLUTION = 0.01  # what the profiler's own work may change in a median
EQUAL = 0.05  # an interval within 5 % of 1, either way, is no difference
RATIO_RULE = (
    f"faster or slower: the whole interval ({100 * LEVEL:g} %) of the ratio is more than {100 * RESOLUTION:g} % beyond "
    f"1; same: it lies within {100 * EQUAL:g} % of 1; too noisy: neither, or fewer than {MIN_STARTS} starts of the "
    f"processes or {MIN_ROUNDS} rounds in all"
)

Starts = Sequence[Sequence[float]]  # start of a process -> one time per round


def typical(starts: Starts) -> float:
    """Median over the rounds of each start, geometric mean over the starts.

    Raises:
        ValueError: no samples, a start without any, or one that is not positive.
    """
    if not len(starts) or not all(map(len, starts)):
        raise ValueError("a median needs at least one sample")
    return math.exp(math.fsum(math.log(np.median(rounds)) for rounds in starts) / len(starts))


def paired_ratio(dense: Starts, slim: Starts, seed: int = 0) -> Ratio:
    """typical(dense) / typical(slim) with a bootstrap that draws starts first and then rounds of each. A start's two
    processes and a round's two samples stay together, so what slows both models down cancels out.

    Args:
        dense, slim: seconds by start and round, in the same order.

    Raises:
        ValueError: no rounds, not as many of one as of the other, or a time that is not positive.
    """
    counts = [[len(rounds) for rounds in starts] for starts in (dense, slim)]
    times = [*chain.from_iterable(dense), *chain.from_iterable(slim)]
    if counts[0] != counts[1] or not counts[0] or not all(counts[0]) or not all(time > 0 for time in times):
        raise ValueError(f"a ratio needs paired positive times; there are {sum(counts[0])} and {sum(counts[1])}")
    before, after = typical(dense), typical(slim)
    value = before / after
    # Quantiles of the logarithm: swapping the models gives the reciprocal interval.
    found = np.quantile(_drawn(dense, slim, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - math.log(value)
    low, high = value * np.exp(np.clip(_widening(len(dense)) * found, -WIDEST, WIDEST))
    low, high = min(low, value), max(high, value)
    return Ratio(after, before, value, float(low), float(high), _relation(low, high, counts[0]))


def _drawn(dense: Starts, slim: Starts, seed: int) -> np.ndarray:
    """Logarithms of the ratios of resampled starts and rounds, [RESAMPLES]."""
    random, starts = np.random.default_rng(seed), len(dense)
    chosen = random.integers(starts, size=(RESAMPLES, starts))
    logarithms = np.empty(chosen.shape)
    for start, pair in enumerate(zip(dense, slim, strict=True)):
        pairs, where = np.array(pair), chosen == start
        draws = random.integers(pairs.shape[1], size=(int(where.sum()), pairs.shape[1]))
        logarithms[where] = np.subtract(*np.log(np.median(pairs[:, draws], axis=2)))
    means: np.ndarray = logarithms.mean(axis=1)
    return means


def _widening(starts: int) -> float:
    """How much too narrow a bootstrap of so few starts is: it divides by n, not n - 1, and knows no Student's t.
    Of fewer than MIN_STARTS no statement is made.
    """
    if starts < MIN_STARTS:
        return 1.0
    freedom = starts - 1
    student = STUDENT[freedom - 2] if freedom - 2 < len(STUDENT) else NORMAL + (NORMAL**3 + NORMAL) / (4 * freedom)
    return student / NORMAL * math.sqrt(starts / (starts - 1))


def _relation(low: float, high: float, rounds: Sequence[int]) -> str:
    """As RATIO_RULE says; `rounds` of every start."""
    if len(rounds) < MIN_STARTS or sum(rounds) < MIN_ROUNDS:
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
    medians = {phase: typical(starts) for phase, starts in run.seconds.items()}
    rates = {phase: tokens[phase] / seconds for phase, seconds in medians.items() if tokens.get(phase)}
    return replace(run, medians=medians, tokens_per_second=rates)


def _ratios(runs: Mapping[str, Run], seed: int) -> dict[str, Ratio]:
    if not {"dense", "slim"} <= set(runs):
        return {}
    dense, slim = runs["dense"].seconds, runs["slim"].seconds
    return {phase: paired_ratio(dense[phase], slim[phase], seed) for phase in slim if phase in dense}


def decoder_test(what: tuple[str, str, str], tokens: int, rates: Mapping[str, Starts], seed: int = 0) -> DecoderTest:
    """A measured decoder test, as llama-bench states it: tokens per second, mean and standard deviation (n - 1).

    Args:
        what: backend, dtype and name (`pp512`).
        rates: model -> tokens per second of every repetition, by start; those of two models are paired.
    """
    runs = {name: _decoder_run(samples) for name, samples in rates.items()}
    ratio = None
    if {"dense", "slim"} <= set(rates):
        dense, slim = ([[tokens / rate for rate in one] for one in rates[name]] for name in ("dense", "slim"))
        ratio = paired_ratio(dense, slim, seed)
    return DecoderTest(*what, tokens, MEASURED, runs=runs, ratio=ratio)


def _decoder_run(starts: Starts) -> DecoderRun:
    rates = [*chain.from_iterable(starts)]
    deviation = float(np.std(rates, ddof=1)) if len(rates) > 1 else 0.0
    return DecoderRun(tuple(map(tuple, starts)), float(np.mean(rates)), deviation)
