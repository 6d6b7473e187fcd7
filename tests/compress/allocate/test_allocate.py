"""Allocation: golden examples G7 and G12, and the fast paths against loops written out from the specification."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.compress.allocate import ALLOCATORS, allocate_balanced, allocate_global, allocate_local, allocate_paper
from slimvlm.compress.allocate.pool import Pool
from slimvlm.compress.errors import InfeasibleBudgetError


def pool_of(*groups: tuple[int, list[float], int, int], floor: float = 0.1) -> Pool:
    """A pool of (modality, scores, cost of a unit, channels of a unit)."""
    rows = [(s, g, cost, c, m) for g, (m, scores, cost, c) in enumerate(groups) for s in scores]
    scores, group, cost, channels, modality = (np.array(column) for column in zip(*rows, strict=True))
    size = np.array([len(scores) * c for _, scores, _, c in groups])
    place = np.stack([group, len(groups) - 1 - group], axis=1) / len(groups)  # a block each
    importance = np.arange(len(groups), dtype=float)
    return Pool(scores.astype(float), group, cost, channels, modality, size, floor, place, importance)


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
    """Units one by one in the order (normalised score, unit), the floor looked up before every unit.

    From the first unit that does not fit on, the means and the order stay: a group is left at its first unit that does
    not fit. If that leaves more missing than the cheapest unit would overshoot by, it goes too, and of the last units
    those that fit in the overshoot come back.
    """
    alive = [True] * len(pool.scores)
    rank = sorted(range(len(alive)), key=lambda u: (pool.scores[u], u))
    cost, group = pool.cost.tolist(), pool.group.tolist()

    def may_go(unit: int) -> bool:
        rest = sum(int(c) for c, g, a in zip(pool.channels, group, alive, strict=True) if a and g == group[unit])
        return rest - int(pool.channels[unit]) >= max(pool.floor * pool.size[group[unit]] - 1e-9, 1)

    def options() -> list[int]:
        """The lowest unit of every group that may lose one."""
        lowest = {group[u]: u for u in reversed(rank) if alive[u]}
        return [u for u in lowest.values() if may_go(u)]

    went: list[int] = []
    missing = target
    means: dict[int, float] = {}
    while missing > 0:
        k = steps[1] if target - missing > 0.9 * target else steps[0]
        open_groups = {group[u] for u in options()}
        if not open_groups:
            raise InfeasibleBudgetError
        for m in set(pool.modality):
            members = [u for u in range(len(alive)) if alive[u] and group[u] in open_groups and pool.modality[u] == m]
            means[m] = (sum(pool.scores[members]) / len(members) if members else 0) or 1

        def position(u: int) -> tuple[float, int]:
            return pool.scores[u] / means[pool.modality[u]], u

        for _ in range(k):
            if not options() or missing <= 0:
                break
            unit = min(options(), key=position)
            if cost[unit] > missing:
                return landed(pool, alive, options, position, went, missing)
            alive[unit] = False
            went.append(unit)
            missing -= cost[unit]
    return ~np.array(alive)


def landed(pool: Pool, alive, options, position, went: list[int], missing: float) -> np.ndarray:
    cost, group = pool.cost.tolist(), pool.group.tolist()
    closed: set[int] = set()
    while open_units := [u for u in options() if group[u] not in closed]:
        unit = min(open_units, key=position)
        if cost[unit] > missing:
            closed.add(group[unit])
            continue
        alive[unit] = False
        went.append(unit)
        missing -= cost[unit]
    if last := options():
        unit = min(last, key=lambda u: (cost[u], position(u)))
        over, back, closed = cost[unit] - missing, [], {group[unit]}
        for u in reversed(went):
            if group[u] not in closed and cost[u] <= over:
                back.append(u)
                over -= cost[u]
            else:
                closed.add(group[u])
        if over < missing:
            alive[unit] = False
            for u in back:
                alive[u] = True
    return ~np.array(alive)


@st.composite
def pools(draw) -> Pool:
    """Scores are small integers, so that sums are exact and ties are common; unit sizes differ by group."""
    groups = []
    for _ in range(draw(st.integers(1, 5))):
        scores = draw(st.lists(st.integers(0, 12), min_size=1, max_size=25))
        groups.append((draw(st.integers(0, 1)), scores, draw(st.integers(1, 9)), draw(st.sampled_from([1, 1, 2, 4]))))
    return pool_of(*groups, floor=draw(st.sampled_from([0.1, 0.25, 0.5])))


def outcome(allocate, *arguments):
    try:
        return allocate(*arguments).tolist()
    except InfeasibleBudgetError:
        return "infeasible"


@given(pools(), st.floats(0, 1), st.sampled_from([(1, 1), (2, 1), (7, 3), (1000, 100)]))
def test_the_paper_s_allocator_equals_the_literal_loop(pool, share, steps):
    target = share * pool.cost.sum()
    found = outcome(allocate_paper, replace(pool, steps=steps), target)
    assert found == outcome(literal_balanced, pool, target, steps)


@given(pools(), st.floats(0, 1), st.sampled_from([(1, 1), (2, 1), (7, 3)]))
def test_product_allocation_equals_a_unit_by_unit_loop(pool, share, steps):
    target = share * pool.cost.sum()
    found = outcome(allocate_balanced, replace(pool, steps=steps), target)
    assert found == outcome(literal_product, pool, target, steps)


@given(pools(), st.floats(0, 1), st.sampled_from([allocate_balanced, allocate_global, allocate_local]))
def test_the_target_is_met_within_half_a_unit_and_floors_hold(pool, share, allocate):
    target = share * pool.cost.sum()
    removed = outcome(allocate, pool, target)
    if removed == "infeasible":
        assert pool.cost[~pool.protected].sum() < target
        return
    removed = np.array(removed)
    miss = pool.cost[removed].sum() - target
    could_still_go = pool.cost[~removed & ~pool.protected]
    assert miss <= pool.cost.max() / 2
    assert -miss <= could_still_go.min(initial=10**9) / 2
    kept = np.bincount(pool.group, np.where(removed, 0, pool.channels), minlength=len(pool.size))
    assert (kept >= np.maximum(pool.floor * pool.size - 1e-9, 1)).all()
    for group in range(len(pool.size)):
        ranked = removed[np.lexsort((pool.scores, pool.group))][np.sort(pool.group) == group]
        assert ranked.tolist() == sorted(ranked, reverse=True)


@given(pools(), st.floats(0.01, 0.99), st.sampled_from([allocate_balanced, allocate_global, allocate_local]))
def test_large_units_are_no_reason_to_miss_a_target_that_small_ones_can_meet(pool, share, allocate):
    """Units of size 1 beside the drawn ones: whatever these cost, the target is met to one of them."""
    count, scores = 2 * int(pool.cost.max()), np.random.default_rng(0).permutation(2 * int(pool.cost.max()))
    beside = Pool(
        np.concatenate([pool.scores, scores / len(scores)]),
        np.concatenate([pool.group, np.full(count, pool.groups)]),
        np.concatenate([pool.cost, np.ones(count, dtype=np.int64)]),
        np.concatenate([pool.channels, np.ones(count, dtype=np.int64)]),
        np.concatenate([pool.modality, np.zeros(count, dtype=np.int64)]),
        np.append(pool.size, count),
        pool.floor,
    )
    target = share * int(beside.cost[~beside.protected].sum())
    removed = allocate(beside, target)
    assert abs(beside.cost[removed].sum() - target) < 1


def test_golden_g7_means_are_taken_again_after_every_step():
    masks = [allocate_paper(replace(G7, steps=(1, 1)), target) for target in range(1, 7)]
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
    removed = allocate_paper(replace(G12, steps=steps), target * 230)
    assert np.flatnonzero(removed).tolist() == sorted(units)
    assert G12.cost[removed].sum() / 230 == pytest.approx(ratio, abs=5e-5)


def test_up_to_a_fifth_the_paper_takes_its_small_step_from_the_start():
    little, much = (allocate_paper(replace(G12, steps=(5, 1), ratio=ratio), 0.2 * 230) for ratio in (0.2, 0.3))
    assert np.array_equal(little, allocate_paper(replace(G12, steps=(1, 1)), 0.2 * 230))
    assert np.array_equal(much, allocate_paper(replace(G12, steps=(5, 1)), 0.2 * 230))
    assert little.sum() < much.sum()


def test_the_product_keeps_floors_where_golden_g12_empties_three_groups():
    removed = allocate_balanced(G12, 0.4 * 230)
    kept = np.bincount(G12.group, ~removed)
    assert (kept >= 1).all() and 0.4 * 230 <= G12.cost[removed].sum() < 0.4 * 230 + 40


def test_global_ignores_modality_and_local_takes_the_same_share_of_every_group():
    pool = pool_of((0, [10, 20, 30, 40], 1, 1), (1, [1, 2, 3, 4], 1, 1))
    assert np.flatnonzero(allocate_global(pool, 3)).tolist() == [4, 5, 6]
    assert np.flatnonzero(allocate_local(pool, 4)).tolist() == [0, 1, 4, 5]


def test_llm_pruner_takes_the_same_share_of_all_blocks_but_the_first_and_last_and_of_these_when_nothing_else_is_left():
    pool = pool_of(*((0, [*range(10)], 1, 1) for _ in range(32)))
    gone = ALLOCATORS["llm-pruner"].flags(pool, 26 * 6).reshape(32, 10).sum(1)
    assert gone.tolist() == [0] * 4 + [6] * 26 + [0] * 2  # LLaMA's 4 to 29
    gone = ALLOCATORS["llm-pruner"].flags(pool, 26 * 9 + 6 * 2).reshape(32, 10).sum(1)
    assert gone.tolist() == [2] * 4 + [9] * 26 + [2] * 2


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
        allocate_paper(replace(pool_of((0, [1, 2], 1, 1)), steps=(1, 1)), 2)


@pytest.mark.parametrize("importance", [[1.0], [1.0, -1.0], [1.0, math.nan]])
def test_importance_that_is_none_of_every_group_is_refused(importance):
    with pytest.raises(ValueError, match="2 finite numbers, none below 0, one per group"):
        replace(pool_of((0, [1], 1, 1), (0, [1], 1, 1)), importance=np.array(importance))


@pytest.mark.parametrize("score", [math.nan, math.inf, -1.0])
def test_scores_that_are_no_importance_are_refused(score):
    with pytest.raises(ValueError, match="finite and not negative"):
        pool_of((0, [1.0, score], 1, 1))


def test_all_scores_zero_is_no_division_by_zero():
    pool = pool_of((0, [0, 0, 0], 1, 1), (1, [0, 0], 1, 1))
    assert allocate_balanced(pool, 3).sum() == 3
    assert allocate_paper(replace(pool, steps=(1, 1)), 3).sum() == 5


@given(pools(), st.floats(0, 1), st.sampled_from(list(ALLOCATORS)))
def test_units_are_named_once_in_the_order_they_go_which_in_a_group_is_that_of_their_scores(pool, share, name):
    try:
        order = ALLOCATORS[name](pool, share * pool.cost.sum()).tolist()
    except InfeasibleBudgetError:
        return
    assert len(set(order)) == len(order)
    for group in range(pool.groups):
        gone = [(pool.scores[unit], unit) for unit in order if pool.group[unit] == group]
        stays = [(pool.scores[unit], unit) for unit in np.flatnonzero(pool.group == group) if unit not in order]
        assert gone == sorted(gone) and max(gone, default=(-1, 0)) < min(stays, default=(math.inf, 0))
