"""ECoFLaP's allocation: the golden examples of its specification (A.7), and what holds for any groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.compress.allocate import ALLOCATORS
from slimvlm.compress.allocate.pool import Pool
from slimvlm.compress.allocate.rules.ecoflap import BEYOND, water_filling

GOLDEN = {
    "G1": ((100, 100, 200), (1, 1, 2), 0.5, 0.6, (50, 50, 100)),
    "G2": ((100, 100, 200), (3, 1, 0), 0.5, 0.6, (70, 50, 80)),
    "G3": ((100, 100, 200), (10, 1, 1), 0.3, 0.6, (100, 70, 110)),
    "G4": ((100, 300, 600), (50, 30, 20), 0.2, 0.6, (100, 300, 400)),
    "G5": ((100, 100, 200), (3, 1, 0), 0.6, 0.6, (40, 40, 80)),
    "G6, all that are important are full": ((100, 100, 200), (1, 0, 0), 0.1, 0.9, (100, 87, 173)),
    "G7, no more than asked for": ((101, 103, 107), (1, 1, 1), 0.5, 0.6, (51, 52, 52)),
    "G8, nothing is important": ((100, 100), (0, 0), 0.5, 0.6, (50, 50)),
    "joint": ((100, 100, 200, 200), (3, 1, 1, 1), 0.5, 0.6, (70, 50, 90, 90)),
    "vision alone": ((100, 100), (3, 1), 0.5, 0.6, (55, 45)),
    "language alone": ((200, 200), (1, 1), 0.5, 0.6, (100, 100)),
}
FRACTIONS = st.floats(0, 1).map(lambda value: round(value, 3))


def filled(sizes, importance, sparsity: float, cap: float) -> np.ndarray:
    return water_filling(np.array(sizes), np.array(importance, dtype=float), sparsity, cap)


@pytest.mark.parametrize(("sizes", "importance", "sparsity", "cap", "kept"), GOLDEN.values(), ids=GOLDEN)
def test_golden_water_filling(sizes, importance, sparsity, cap, kept):
    assert filled(sizes, importance, sparsity, cap).tolist() == list(kept)


@given(st.data(), FRACTIONS, FRACTIONS)
def test_what_is_kept_is_exactly_what_was_asked_within_every_group_s_cap_and_size(data, one, other):
    sparsity, cap = sorted((one, other))
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=8))
    importance = data.draw(st.lists(st.just(0.0) | st.floats(1e-12, 1e12), min_size=len(sizes), max_size=len(sizes)))
    kept = filled(sizes, importance, sparsity, cap)
    assert abs(kept.sum() - sum(sizes) * (1 - sparsity)) < 1
    assert (kept >= 0).all() and (kept <= sizes).all()
    assert (kept >= np.array(sizes) * (1 - cap) - len(sizes)).all()


def test_groups_as_important_as_they_are_large_lose_the_same_and_more_important_ones_less():
    sizes = np.array([100, 300, 700])
    assert filled(sizes, sizes, 0.4, 0.5).tolist() == [60, 180, 420]
    shares = [filled(sizes, (value, 300, 700), 0.4, 0.5)[0] for value in (0, 50, 100, 200, 10**9)]
    assert shares == sorted(set(shares)) and shares[0] == 50 and shares[-1] == 100


def pool(importance, gone: int = 0) -> Pool:
    """Two groups of 40 and one of 80 units of three parameters, of which the first lost some."""
    counts = np.array([40 - gone, 40, 80])
    group = np.repeat(np.arange(3), counts)
    ones = np.ones(len(group), dtype=np.int64)
    scores = np.random.default_rng(0).random(len(group))
    return Pool(scores, group, 3.0 * ones, ones, ones, np.array([40, 40, 80]), importance=np.array(importance, float))


def kept(asked: Pool, target: float) -> list[int]:
    return np.bincount(asked.group[~ALLOCATORS["ecoflap"].flags(asked, target)], minlength=3).tolist()


def test_units_go_by_score_and_as_many_of_each_group_as_water_filling_says():
    assert kept(pool((3, 1, 1)), 3 * 40) == pytest.approx([35.6, 29.2, 55.2], abs=1)
    assert kept(pool((1, 1, 2)), 3 * 40) == [30, 30, 60]
    assert kept(replace(pool((3, 1, 1)), cost=pool((3, 1, 1)).cost / 1e9), 3e-9 * 40) == kept(pool((3, 1, 1)), 3 * 40)


def test_what_earlier_rounds_took_counts_so_that_rounds_end_near_where_one_shot_does():
    """Four attentions of eight heads beside MLPs of 256 channels: the heads are coarse, and may not go for rounding."""
    counts, costs = np.array([8, 256] * 4), np.array([32.0, 1.0] * 4)
    whole = Pool(
        scores=np.random.default_rng(1).random(counts.sum()),
        group=np.repeat(np.arange(8), counts),
        cost=np.repeat(costs, counts),
        channels=np.repeat(costs, counts).astype(np.int64),
        modality=np.zeros(counts.sum(), dtype=np.int64),
        size=np.full(8, 256),
        importance=np.array([3.0, 5, 1, 1, 2, 1, 1, 4]),
    )

    def left(rounds: int) -> np.ndarray:
        stays = np.ones(len(whole.scores), dtype=bool)
        for number in range(1, rounds + 1):
            now = replace(
                whole,
                **{name: getattr(whole, name)[stays] for name in ("scores", "group", "cost", "channels", "modality")},
            )
            target = 0.4 * number / rounds * whole.cost.sum() - whole.cost[~stays].sum()
            stays[np.flatnonzero(stays)[ALLOCATORS["ecoflap"](now, target)]] = False
        return np.bincount(whole.group[stays], whole.cost[stays], minlength=8) / 256

    assert left(8) == pytest.approx(left(1), abs=1 / 8 + 0.01)
    wanted = water_filling(np.full(8, 256), whole.importance, 0.4, 0.4 + BEYOND) / 256
    assert left(8) == pytest.approx(wanted, abs=1 / 16 + 0.03)


def test_no_group_loses_more_than_the_cap_where_the_floors_leave_the_choice():
    left = np.array(kept(pool((1, 0, 0)), 3 * 80))
    assert (1 - left / [40, 40, 80]).max() <= 0.5 + BEYOND + 1 / 40


def test_without_importance_it_refuses_instead_of_planning_uniformly():
    with pytest.raises(ValueError, match="ecoflap needs the importance of the groups"):
        ALLOCATORS["ecoflap"](replace(pool((1, 1, 1)), importance=None), 3)
