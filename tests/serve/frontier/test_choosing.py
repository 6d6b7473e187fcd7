"""Which artefacts of a frontier are worth having."""

from __future__ import annotations

import doctest
import itertools

import pytest
from frontiers import example_frontier, example_point
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.compress.files.decoding import decode, parse
from slimvlm.serve.frontier import schedule
from slimvlm.serve.frontier.choosing import pareto, recommend
from slimvlm.serve.frontier.frontier import Frontier
from slimvlm.serve.frontier.schedule import fits, informative_order

DENSE = (
    example_point(0, "fp32", 11_200_000, 0.0, 4.0),
    example_point(0, "int8", 3_600_000, 0.2, 1.6),
    example_point(0, "q4", 2_500_000, 0.3, 2.0),
)
CUTS = (example_point(0.2, "q4", 2_100_000, 0.8, 1.5), example_point(0.5, "q4", 1_700_000, 12.1, 1.0))
POINTS = st.lists(
    st.builds(
        example_point,
        st.sampled_from((0, 0.2, 0.5)),
        st.sampled_from(("fp32", "int8")),
        st.integers(1, 9).map(lambda size: size * 100_000),
        st.integers(-2, 20).map(float),
    ),
    max_size=8,
)


@given(POINTS)
def test_no_point_of_the_line_is_beaten_and_every_other_point_is(points):
    line = pareto(example_frontier(*points), "size")
    for one, other in itertools.pairwise(line):
        assert one.bytes < other.bytes and one.drop > other.drop
    for point in points:
        assert any(one.bytes <= point.bytes and one.drop <= point.drop for one in line)


def test_the_smallest_and_the_fastest_within_a_point_are_named_beside_the_best_dense_variant():
    smallest, fastest = recommend(example_frontier(*DENSE, *CUTS))
    assert (smallest.point, fastest.point) == (CUTS[0], CUTS[0])
    assert "2.1 MB" in smallest.sentence and "dense q4, 2.5 MB" in smallest.sentence
    assert "1.5 ms" in fastest.sentence and "dense int8, 1.6 ms" in fastest.sentence


def test_times_are_compared_through_the_dense_model_that_ran_in_turns():
    """The device was half as fast when the cut was timed: it is the faster one all the same."""
    full = example_point(0, "fp32", 900, 0.0, 5.0)
    dense, cut = example_point(0, "q4", 800, 0.1, 2.0, 4.0), example_point(0.2, "q4", 700, 0.2, 2.5, 8.0)
    frontier = example_frontier(full, dense, cut)
    assert [frontier.cost(point, "tpot") for point in (full, dense, cut)] == pytest.approx([6.0, 3.0, 6 / 3.2])
    assert [point.milliseconds("tpot") for point in (full, dense, cut)] == pytest.approx([5.0, 2.0, 2.5])
    _, fastest = recommend(frontier)
    assert fastest.point == cut and fastest.sentence.endswith("dense q4, 3 ms.")


def test_a_cut_whose_speed_up_is_within_the_interval_of_a_dense_variants_is_said_to_be():
    dense, cut = example_point(0, "q4", 800, 0.1, 2.0, 4.0), example_point(0.2, "q4", 700, 0.2, 1.99, 4.0)
    _, fastest = recommend(example_frontier(dense, cut))
    assert fastest.point == cut and fastest.sentence.endswith("which its interval does not tell from it.")


def test_where_a_dense_variant_is_best_it_is_said_that_no_cut_is_better():
    smallest, _ = recommend(example_frontier(*DENSE, CUTS[1]))
    assert smallest.point == DENSE[2] and "no cut that was measured is better" in smallest.sentence


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("size=3MB", DENSE[2]),
        ("size=2.2MB", CUTS[0]),
        ("tpot=1.2ms", CUTS[1]),
        ("drop=0.25", DENSE[1]),
        ("drop=15", CUTS[1]),
        ("size=1MB", None),
    ],
)
def test_under_a_target_the_point_that_loses_least_is_best_and_under_a_bound_of_loss_the_smallest(target, chosen):
    *_, choice = recommend(example_frontier(*DENSE, *CUTS, targets=(target,)))
    assert choice.point == chosen
    assert (chosen is not None) == ("none of the points" not in choice.sentence)


def test_a_frontier_is_read_as_it_was_written():
    frontier = example_frontier(*DENSE, targets=("size=3MB",), skipped={"0.9 fp32": "too much"})
    assert decode(parse(frontier.to_json()), Frontier) == frontier


def test_the_dense_model_is_measured_first_and_every_ratio_once():
    assert doctest.testmod(schedule).failed == 0
    order = informative_order((0.5, 0.1, 0.3, 0.5))
    assert order[0] == 0 and sorted(order) == [0, 0.1, 0.3, 0.5]


def test_a_budget_ends_before_the_ratio_that_would_exceed_it():
    assert fits(90, [30, 40], None) and fits(1e9, [30], 60)
    assert fits(80, [30, 40], 120) and not fits(81, [30, 40], 120)


def test_what_is_lost_is_never_less_than_nothing_by_a_sign_alone():
    assert example_point(0, "int8", 1, -0.004).lost == "0.0 (-0.5 to 0.5)"
