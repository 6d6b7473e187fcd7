"""Statements follow from samples by the stated rule, and the rule is fair to both models."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import example_cell

from slimvlm.serve.judging.intervals import (
    MIN_ROUNDS,
    MIN_STARTS,
    decoder_test,
    paired_ratio,
    summarize_cell,
    typical,
)
from slimvlm.serve.profile import FASTER, OUT_OF_MEMORY, SAME, SLOWER, TOO_NOISY

TIMES = st.floats(1e-5, 1e3)
ROUNDS = st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=8)
STARTS = st.lists(ROUNDS, min_size=1, max_size=5)
SWAPPED = {FASTER: SLOWER, SLOWER: FASTER, SAME: SAME, TOO_NOISY: TOO_NOISY}


def noisy(mean: float, spread: float, rounds: int = 7, seed: int = 0, starts: int = MIN_STARTS, apart: float = 0.0):
    """Times by start: rounds differ by `spread`, starts by `apart`."""
    random = np.random.default_rng(seed)
    levels = mean * np.exp(apart * random.standard_normal((starts, 1)))
    return (levels * np.exp(spread * random.standard_normal((starts, rounds)))).tolist()


def alike(time: float, rounds: int = 7, starts: int = MIN_STARTS):
    return [rounds * [time] for _ in range(starts)]


def of_both(starts):
    return tuple([[pair[model] for pair in rounds] for rounds in starts] for model in (0, 1))


@given(STARTS)
@settings(max_examples=30, deadline=None)
def test_the_interval_holds_the_ratio_and_is_reciprocal_for_swapped_models(starts) -> None:
    dense, slim = of_both(starts)
    ratio, swapped = paired_ratio(dense, slim), paired_ratio(slim, dense)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(ratio.dense / ratio.slim) == pytest.approx(typical(dense) / typical(slim))
    mirrored = (1 / swapped.value, 1 / swapped.high, 1 / swapped.low)
    assert mirrored == pytest.approx((ratio.value, ratio.low, ratio.high))


@given(STARTS, st.floats(1e-2, 1e2))
@settings(max_examples=30, deadline=None)
def test_the_ratio_does_not_depend_on_the_unit_of_time(starts, unit: float) -> None:
    dense, slim = of_both(starts)
    scaled = [[[unit * time for time in rounds] for rounds in model] for model in (dense, slim)]
    first, second = paired_ratio(dense, slim), paired_ratio(*scaled)
    assert (first.value, first.low, first.high) == pytest.approx((second.value, second.low, second.high))


@given(STARTS)
@settings(max_examples=30, deadline=None)
def test_nothing_is_called_faster_or_slower_whose_interval_contains_one(starts) -> None:
    ratio = paired_ratio(*of_both(starts))
    if ratio.low <= 1 <= ratio.high:
        assert ratio.verdict in (SAME, TOO_NOISY)


@pytest.mark.parametrize(
    ("dense", "slim", "verdict"),
    [
        (noisy(2.0, 0.02), noisy(1.0, 0.02, seed=1), FASTER),
        (noisy(1.0, 0.02), noisy(2.0, 0.02, seed=1), SLOWER),
        (noisy(1.0, 0.01), noisy(1.0, 0.01, seed=1), SAME),
        (noisy(1.0, 0.5), noisy(1.1, 0.5, seed=1), TOO_NOISY),
        (alike(2.0, 1), alike(1.0, 1), TOO_NOISY),
        (alike(2.0, MIN_ROUNDS, MIN_STARTS - 1), alike(1.0, MIN_ROUNDS, MIN_STARTS - 1), TOO_NOISY),
        (alike(1.005), alike(1.0), SAME),  # within what the profiler itself may change
        (alike(1.02), alike(1.0), FASTER),
    ],
)
def test_the_verdict_follows_the_rule(dense, slim, verdict: str) -> None:
    assert paired_ratio(dense, slim).verdict == verdict


def test_what_slows_down_both_models_of_a_round_cancels_out() -> None:
    weather = np.array(noisy(1.0, 0.5, apart=0.5))
    together = paired_ratio(1.3 * weather, weather)
    apart = paired_ratio(1.3 * weather, weather[::-1, ::-1])
    assert together.verdict == FASTER
    assert (together.low, together.high) == pytest.approx((1.3, 1.3))
    assert apart.high - apart.low > 0.2


def width(dense, slim) -> float:
    ratio = paired_ratio(dense, slim)
    return ratio.high / ratio.low


@pytest.mark.parametrize("starts", (MIN_STARTS, 2 * MIN_STARTS))
@pytest.mark.parametrize("apart", (0.0, 0.1))
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(starts: int, apart: float) -> None:
    hits = 0
    for seed in range(200):
        dense, slim = (noisy(time, 0.05, 4, seed + first, starts, apart) for time, first in ((1.5, 0), (1.0, 10_000)))
        ratio = paired_ratio(dense, slim)
        hits += ratio.low <= 1.5 <= ratio.high
    assert hits >= 0.92 * 200


def test_starts_that_differ_widen_the_interval_more_than_the_same_rounds_of_one_process_show() -> None:
    dense, slim = noisy(1.5, 0.01, 4, 1, 6, apart=0.1), noisy(1.0, 0.01, 4, 2, 6, apart=0.1)
    level = [[[time / np.median(rounds) for time in rounds] for rounds in starts] for starts in (dense, slim)]
    assert width(dense, slim) > 1.1 > 1.05 > width(*level)
    in_one = [[time for rounds in starts for time in rounds] for starts in level]
    assert width(*([one] for one in in_one)) < 1.05
    assert width(dense[:3], slim[:3]) > 1.05  # few starts are no excuse


def test_more_starts_narrow_the_interval_where_more_rounds_do_not() -> None:
    def typical_width(rounds: int, starts: int) -> float:
        pairs = [[noisy(1.0, 0.01, rounds, seed + 99 * model, starts, 0.1) for model in (0, 1)] for seed in range(9)]
        return float(np.median([np.log(width(*pair)) for pair in pairs]))

    few = typical_width(4, 3)
    assert typical_width(16, 3) > 0.8 * few
    assert typical_width(4, 12) < 0.5 * few


def test_the_same_seed_gives_the_same_interval() -> None:
    dense, slim = noisy(1.2, 0.1), noisy(1.0, 0.1, seed=1)
    assert paired_ratio(dense, slim, 3) == paired_ratio(dense, slim, 3)
    assert paired_ratio(dense, slim, 3) != paired_ratio(dense, slim, 4)


@pytest.mark.parametrize(
    ("dense", "slim"),
    [
        ([], []),
        ([[]], [[]]),
        ([[1.0]], [[1.0, 2.0]]),
        ([[1.0], [1.0]], [[1.0, 1.0]]),
        ([[1.0, 0.0]], [[1.0, 1.0]]),
        ([[1.0, float("nan")]], [[1.0, 1.0]]),
    ],
)
def test_samples_that_are_no_pairs_of_times_are_refused(dense, slim) -> None:
    with pytest.raises(ValueError, match="paired positive times"):
        paired_ratio(dense, slim)
    for starts in ([], [[]], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one sample"):
            typical(starts)


def test_a_cell_is_summarized_from_its_samples() -> None:
    raw = example_cell()
    bare = {name: replace(run, medians={}, tokens_per_second={}) for name, run in raw.runs.items()}
    cell = summarize_cell(replace(raw, batch_size=2, runs=bare, ratios={}))
    slim = cell.runs["slim"]
    assert slim.medians == pytest.approx(raw.runs["slim"].medians)
    assert slim.tokens_per_second["prefill"] == pytest.approx(2 * 16 / 0.010)
    assert slim.tokens_per_second["tpot"] == pytest.approx(2 / 0.002)
    assert slim.tokens_per_second["end_to_end"] == pytest.approx(2 * 16 / 0.052)
    assert cell.ratios["tpot"].value == pytest.approx(2)
    assert summarize_cell(replace(raw, runs={"slim": bare["slim"]})).ratios == {}
    lost = replace(raw, status=OUT_OF_MEMORY, runs={})
    assert summarize_cell(lost) == lost


def test_a_decoder_test_states_mean_and_deviation_as_llama_bench_does() -> None:
    rates = {"dense": [[100.0], [110.0], [90.0]], "slim": [[200.0], [220.0], [180.0]]}
    test = decoder_test(("torch", "fp32", "pp512"), 512, rates)
    assert (test.runs["slim"].mean, test.runs["slim"].std) == pytest.approx((200.0, 20.0))
    assert test.ratio.value == pytest.approx(2)
    assert test.ratio.dense == pytest.approx(5.12, rel=0.01)
    assert decoder_test(("torch", "fp32", "tg128"), 128, {"slim": [[50.0]]}).runs["slim"].std == 0
