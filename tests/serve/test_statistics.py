"""Statements follow from samples by the stated rule, and the rule is fair to both models."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import example_cell

from slimvlm.serve.profile import FASTER, OUT_OF_MEMORY, SAME, SLOWER, TOO_NOISY
from slimvlm.serve.statistics import MIN_ROUNDS, decoder_test, median, paired_ratio, summarize_cell

TIMES = st.floats(1e-5, 1e3)
ROUNDS = st.lists(st.tuples(TIMES, TIMES), min_size=MIN_ROUNDS, max_size=20)
SWAPPED = {FASTER: SLOWER, SLOWER: FASTER, SAME: SAME, TOO_NOISY: TOO_NOISY}


def noisy(mean: float, spread: float, rounds: int = 20, seed: int = 0) -> list[float]:
    return list(mean * np.exp(spread * np.random.default_rng(seed).standard_normal(rounds)))


@given(ROUNDS)
@settings(max_examples=30, deadline=None)
def test_the_interval_holds_the_ratio_and_is_reciprocal_for_swapped_models(rounds: list[tuple[float, float]]) -> None:
    dense, slim = zip(*rounds, strict=True)
    ratio, swapped = paired_ratio(dense, slim), paired_ratio(slim, dense)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(np.median(dense) / np.median(slim))
    mirrored = (1 / swapped.value, 1 / swapped.high, 1 / swapped.low)
    assert mirrored == pytest.approx((ratio.value, ratio.low, ratio.high))


@given(ROUNDS, st.floats(1e-2, 1e2))
@settings(max_examples=30, deadline=None)
def test_the_ratio_does_not_depend_on_the_unit_of_time(rounds: list[tuple[float, float]], unit: float) -> None:
    dense, slim = np.array(rounds).T
    first, second = paired_ratio(dense, slim), paired_ratio(unit * dense, unit * slim)
    assert (first.value, first.low, first.high) == pytest.approx((second.value, second.low, second.high))


@given(ROUNDS)
@settings(max_examples=30, deadline=None)
def test_nothing_is_called_faster_or_slower_whose_interval_contains_one(rounds: list[tuple[float, float]]) -> None:
    dense, slim = zip(*rounds, strict=True)
    ratio = paired_ratio(dense, slim)
    if ratio.low <= 1 <= ratio.high:
        assert ratio.verdict in (SAME, TOO_NOISY)


@pytest.mark.parametrize(
    ("dense", "slim", "verdict"),
    [
        (noisy(2.0, 0.02), noisy(1.0, 0.02, seed=1), FASTER),
        (noisy(1.0, 0.02), noisy(2.0, 0.02, seed=1), SLOWER),
        (noisy(1.0, 0.01), noisy(1.0, 0.01, seed=1), SAME),
        (noisy(1.0, 0.5), noisy(1.1, 0.5, seed=1), TOO_NOISY),
        ([2.0] * (MIN_ROUNDS - 1), [1.0] * (MIN_ROUNDS - 1), TOO_NOISY),
        ([1.005] * 20, [1.0] * 20, SAME),  # within what the profiler itself may change
        ([1.02] * 20, [1.0] * 20, FASTER),
    ],
)
def test_the_verdict_follows_the_rule(dense: list[float], slim: list[float], verdict: str) -> None:
    assert paired_ratio(dense, slim).verdict == verdict


def test_what_slows_down_both_models_of_a_round_cancels_out() -> None:
    weather = np.array(noisy(1.0, 0.5))
    together = paired_ratio(1.3 * weather, weather)
    apart = paired_ratio(1.3 * weather, weather[::-1])
    assert together.verdict == FASTER
    assert (together.low, together.high) == pytest.approx((1.3, 1.3))
    assert apart.high - apart.low > 0.2


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(200):
        ratio = paired_ratio(noisy(1.5, 0.1, 12, seed), noisy(1.0, 0.1, 12, seed + 10_000))
        hits += ratio.low <= 1.5 <= ratio.high
    assert hits >= 0.9 * 200


def test_the_same_seed_gives_the_same_interval() -> None:
    dense, slim = noisy(1.2, 0.1), noisy(1.0, 0.1, seed=1)
    assert paired_ratio(dense, slim, 3) == paired_ratio(dense, slim, 3)
    assert paired_ratio(dense, slim, 3) != paired_ratio(dense, slim, 4)


@pytest.mark.parametrize(("dense", "slim"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 1.0])])
def test_samples_that_are_no_pairs_of_times_are_refused(dense: list[float], slim: list[float]) -> None:
    with pytest.raises(ValueError, match="paired positive times"):
        paired_ratio(dense, slim)
    with pytest.raises(ValueError, match="at least one sample"):
        median([])


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
    rates = {"dense": [100.0, 110.0, 90.0], "slim": [200.0, 220.0, 180.0]}
    test = decoder_test(("torch", "fp32", "pp512"), 512, rates)
    assert (test.runs["slim"].mean, test.runs["slim"].std) == pytest.approx((200.0, 20.0))
    assert test.ratio.value == pytest.approx(2)
    assert test.ratio.dense == pytest.approx(5.12)
    assert decoder_test(("torch", "fp32", "tg128"), 128, {"slim": [50.0]}).runs["slim"].std == 0
