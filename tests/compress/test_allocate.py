"""Allocation: golden examples G7 and G12, and the fast paths against loops written out from the specification."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.compress.allocate import Pool, allocate_balanced, allocate_global, allocate_local
from slimvlm.compress.errors import InfeasibleBudgetError


def pool_of(*groups: tuple[int, list[float], int, int], floor: float = 0.1) -> Pool:
    """A pool of (modality, scores, cost of a unit, channels of a unit)."""
    rows = [(s, g, cost, c, m) for g, (m, scores, cost, c) in enumerate(groups) for s in scores]
    scores, group, cost, channels, modality = (np.array(column) for column in zip(*rows, strict=True))
    size = np.array([len(scores) * c for _, scores, _, c in groups])
    return Pool(scores.astype(float), group, cost, channels, modality, size, floor)


G7 = pool_of((0, [1, 2, 6, 7], 1, 1), (1, [0.1, 0.2, 0.3, 3.4], 1, 1))
G12 = pool_of(
    (0, [1, 2, 3, 4], 5, 1),
    (0, [2.5, 6], 20, 2),
    (1, [0.1, 0.2, 0.4, 0.9, 1.4], 8, 1),
    (1, [0.3, 3.0], 40, 4),
)
A, B, C, D = 0, 4, 6, 11  # first unit of each group of G12


def literal_balanced(pool: Pool, target: float, steps: tuple[int, int]) -> np.ndarray:
    """The paper's loop as specified (ukmp 2.5), everything recomputed in every step."""
    alive = np.ones(len(pool.scores), dtype=bool)
    while (gone := pool.cost[~alive].sum()) < target:
        k = steps[1] if gone > 0.9 * target else steps[0]
        kept = np.array([pool.channels[alive & (pool.group == g)].sum() for g in range(len(pool.size))])
        active = ((kept * 10 >= pool.size) & (kept != 1))[pool.group]
        if not (alive & active).any():
            raise InfeasibleBudgetError
        normalised = np.full(len(alive), math.inf)
        for m in set(pool.modality):
            chosen = alive & active & (pool.modality == m)
            if chosen.any():
                normalised[chosen] = pool.scores[chosen] / (pool.scores[chosen].sum() / chosen.sum() or 1)
        ordered = np.sort(normalised[active])
        threshold = ordered[k - 1] if k <= len(ordered) else math.inf
        alive &= ~(active & (normalised <= threshold))
    return ~alive


def literal_product(pool: Pool, target: float, steps: tuple[int, int]) -> np.ndarray:
    """Units one by one in the order (normalised score, unit), the floor looked up before every unit."""
    alive = [True] * len(pool.scores)

    def kept(group: int) -> int:
        return sum(int(c) for c, g, a in zip(pool.channels, pool.group, alive, strict=True) if a and g == group)

    def may_go(unit: int) -> bool:
        rest = kept(pool.group[unit]) - int(pool.channels[unit])
        return alive[unit] and rest >= max(pool.floor * pool.size[pool.group[unit]] - 1e-9, 1)

    def best_of_equals(unit: int) -> bool:  # a worse unit of the same group goes first
        return all(
            not alive[u] or (pool.scores[u], u) >= (pool.scores[unit], unit)
            for u in np.flatnonzero(pool.group == pool.group[unit])
        )

    gone = 0
    while gone < target:
        k = steps[1] if gone > 0.9 * target else steps[0]
        lowest = [u for u in range(len(alive)) if alive[u] and best_of_equals(u)]
        open_groups = {int(pool.group[u]) for u in lowest if may_go(u)}
        if not open_groups:
            raise InfeasibleBudgetError
        means = {}
        for m in set(pool.modality):
            members = [
                u for u in range(len(alive)) if alive[u] and pool.group[u] in open_groups and pool.modality[u] == m
            ]
            means[m] = (sum(pool.scores[members]) / len(members) if members else 0) or 1
        for _ in range(k):
            options = [u for u in range(len(alive)) if alive[u] and best_of_equals(u) and may_go(u)]
            if not options or gone >= target:
                break
            unit = min(options, key=lambda u: (pool.scores[u] / means[pool.modality[u]], u))
            alive[unit] = False
            gone += int(pool.cost[unit])
    return ~np.array(alive)


@st.composite
def pools(draw) -> Pool:
    """Scores are small integers, so that sums are exact and ties are common; unit sizes differ by group."""
    groups = []
    for _ in range(draw(st.integers(1, 5))):
        scores = draw(st.lists(st.integers(0, 12), min_size=1, max_size=25))
        groups.append((draw(st.integers(0, 1)), scores, draw(st.integers(1, 9)), draw(st.sampled_from([1, 1, 2, 4]))))
    return pool_of(*groups, floor=draw(st.sampled_from([0.1, 0.25, 0.5])))


def outcome(allocate, *arguments, **options):
    try:
        return allocate(*arguments, **options).tolist()
    except InfeasibleBudgetError:
        return "infeasible"


@given(pools(), st.floats(0, 1), st.sampled_from([(1, 1), (2, 1), (7, 3), (1000, 100)]))
def test_faithful_allocation_equals_the_literal_loop(pool, share, steps):
    target = share * pool.cost.sum()
    found = outcome(allocate_balanced, pool, target, faithful=True, steps=steps)
    assert found == outcome(literal_balanced, pool, target, steps)


@given(pools(), st.floats(0, 1), st.sampled_from([(1, 1), (2, 1), (7, 3)]))
def test_product_allocation_equals_a_unit_by_unit_loop(pool, share, steps):
    target = share * pool.cost.sum()
    found = outcome(allocate_balanced, pool, target, steps=steps)
    assert found == outcome(literal_product, pool, target, steps)


@given(pools(), st.floats(0, 1), st.sampled_from([allocate_balanced, allocate_global, allocate_local]))
def test_the_target_is_met_within_one_unit_and_floors_hold(pool, share, allocate):
    target = share * pool.cost.sum()
    removed = outcome(allocate, pool, target)
    if removed == "infeasible":
        assert pool.cost[~pool.protected].sum() < target
        return
    removed = np.array(removed)
    gone = pool.cost[removed].sum()
    assert target <= gone <= target + pool.cost.max()
    kept = np.bincount(pool.group, np.where(removed, 0, pool.channels), minlength=len(pool.size))
    assert (kept >= np.maximum(pool.floor * pool.size - 1e-9, 1)).all()


def test_golden_g7_means_are_taken_again_after_every_step():
    masks = [allocate_balanced(G7, target, faithful=True, steps=(1, 1)) for target in range(1, 7)]
    order: list[str] = []
    for mask in masks:
        order += [name for unit in np.flatnonzero(mask) if (name := f"{'VL'[unit // 4]}{unit % 4}") not in order]
    assert order == ["L0", "L1", "L2", "V0", "V1", "V2"]  # with fixed means L2 would go after V0


@pytest.mark.parametrize(
    ("target", "steps", "units", "ratio"),
    [
        (0.05, (2, 1), [C, C + 1], 0.0696),
        (0.20, (2, 1), [C, C + 1, D, A], 0.2652),
        (0.30, (2, 2), [C, C + 1, D, A, C + 2, A + 1], 0.3217),
        (0.40, (2, 2), [C, C + 1, D, A, C + 2, A + 1, C + 3, B], 0.4435),
        (0.45, (2, 2), [C, C + 1, D, A, C + 2, A + 1, C + 3, B, A + 2, A + 3], 0.4870),
        (0.50, (2, 1), [C, C + 1, D, A, C + 2, A + 1, C + 3, B, A + 2, A + 3, B + 1, D + 1], 0.7478),
    ],
)
def test_golden_g12_step_by_step(target, steps, units, ratio):
    removed = allocate_balanced(G12, target * 230, faithful=True, steps=steps)
    assert np.flatnonzero(removed).tolist() == sorted(units)
    assert G12.cost[removed].sum() / 230 == pytest.approx(ratio, abs=5e-5)


def test_the_product_keeps_floors_where_golden_g12_empties_three_groups():
    removed = allocate_balanced(G12, 0.4 * 230)
    kept = np.bincount(G12.group, ~removed)
    assert (kept >= 1).all() and 0.4 * 230 <= G12.cost[removed].sum() < 0.4 * 230 + 40


def test_global_ignores_modality_and_local_takes_the_same_share_of_every_group():
    pool = pool_of((0, [10, 20, 30, 40], 1, 1), (1, [1, 2, 3, 4], 1, 1))
    assert np.flatnonzero(allocate_global(pool, 3)).tolist() == [4, 5, 6]
    assert np.flatnonzero(allocate_local(pool, 4)).tolist() == [0, 1, 4, 5]
    assert np.flatnonzero(allocate_local(pool, 4, faithful=True)).tolist() == [0, 1, 4, 5]


def test_ties_go_by_group_then_position():
    pool = pool_of((0, [1, 1, 1], 1, 1), (0, [1, 1, 1], 1, 1))
    assert np.flatnonzero(allocate_balanced(pool, 3)).tolist() == [0, 1, 3]


def test_floors_refer_to_the_dense_size_when_the_model_is_partly_cut():
    pool = pool_of((0, [1, 2, 3, 4], 1, 1))
    once_larger = Pool(pool.scores, pool.group, pool.cost, pool.channels, pool.modality, np.array([30]))
    assert np.flatnonzero(~once_larger.protected).tolist() == [0]


def test_an_impossible_target_is_refused_with_what_is_possible():
    with pytest.raises(InfeasibleBudgetError, match="allows at most 3"):
        allocate_balanced(pool_of((0, [1, 2, 3, 4], 1, 1)), 4)
    with pytest.raises(InfeasibleBudgetError, match="leaves a group alone"):
        allocate_balanced(pool_of((0, [1, 2], 1, 1)), 2, faithful=True, steps=(1, 1))


@pytest.mark.parametrize("score", [math.nan, math.inf, -1.0])
def test_scores_that_are_no_importance_are_refused(score):
    with pytest.raises(ValueError, match="finite and not negative"):
        pool_of((0, [1.0, score], 1, 1))


def test_all_scores_zero_is_no_division_by_zero():
    pool = pool_of((0, [0, 0, 0], 1, 1), (1, [0, 0], 1, 1))
    assert allocate_balanced(pool, 3).sum() == 3
    assert allocate_balanced(pool, 3, faithful=True, steps=(1, 1)).sum() == 5
