"""The contract of every method: every criterion with every allocator, on a decoder with grouped queries and on an
encoder-decoder; criteria also on a decoder with experts. A new row is tested here without a line more.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import Tiny, tiny_model

from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.allocate.budget import Budget, order_units
from slimvlm.compress.allocate.bundles import lines_of
from slimvlm.compress.allocate.costs import COSTS
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import Scores, score_groups
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import Group, find_groups, find_units
from slimvlm.compress.plan import BLOCK
from slimvlm.compress.rounds import Planning
from slimvlm.compress.statistics.collect import collect, importance_of
from slimvlm.compress.statistics.rows import STATISTICS

NAMES = ("llava", "blip2_t5")
ORDERS = {"together": ((0, 1, 2, 3),), "apart": ((2,), (0,), (3,), (1,)), "pairs": ((3, 1), (2, 0))}
UNBATCHED = [
    name
    for name, row in CRITERIA.items()
    if not any(STATISTICS[statistic].per_batch for statistic in row.calibration().statistics)
]
EXPERTS = "qwen3_vl_moe"
WIDTHS = [name for name, row in CRITERIA.items() if row.units != BLOCK]


@cache
def tiny_groups(name: str, criterion: str) -> tuple[Tiny, tuple[Group, ...]]:
    tiny = tiny_model(name)
    return tiny, find_units(tiny.model, find_family(tiny.model.config), CRITERIA[criterion].units)


def scored(name: str, criterion: str, order: str = "together") -> Scores:
    tiny, groups = tiny_groups(name, criterion)
    row, calibration = CRITERIA[criterion], None
    if row.calibration().statistics:
        samples = tiny.inputs(4)
        # Patches of all images stand one after the other in some families.
        each = {key: value.unflatten(0, (4, -1)) for key, value in samples.items()}
        batches = [{k: v[list(chosen)].flatten(0, 1) for k, v in each.items()} for chosen in ORDERS[order]]
        family = find_family(tiny.model.config)
        calibration = collect(tiny.model, family, groups, batches, row.calibration())
    return score_groups(groups, row, calibration, tiny.model, seed=3)


once = cache(scored)


@cache
def importance(name: str, allocator: str, criterion: str) -> dict[str, float] | None:
    tiny, groups = tiny_groups(name, criterion)
    planning = Planning(Budget(0.3, allocator=allocator), CRITERIA[criterion])
    return importance_of(tiny.model, groups, lambda: [tiny.inputs(2)], planning.asks)


def ordered(name: str, allocator: str, scores: Scores) -> Order:
    tiny, groups = tiny_groups(name, scores.criterion.name)
    scores = replace(scores, importance=importance(name, allocator, scores.criterion.name))
    return order_units(groups, scores, Budget(0.3, allocator=allocator), facts_of(tiny.model, groups))


@pytest.mark.parametrize(
    ("criterion", "name"), [*product(CRITERIA, NAMES), *((criterion, EXPERTS) for criterion in WIDTHS)]
)
def test_a_criterion_gives_every_unit_one_finite_score(criterion: str, name: str) -> None:
    scores = once(name, criterion)
    for group in tiny_groups(name, criterion)[1]:
        values, members = scores.values[group.key], scores.members[group.key]
        assert values.dtype == torch.float32 and values.shape == (group.num_units,) and len(members) == group.num_units
        assert values.isfinite().all() and (values >= 0).all() and len(set(values.tolist())) > 1, group.key
        assert sorted(members.flatten().tolist()) == list(range(group.size))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("criterion", UNBATCHED)
def test_scores_do_not_depend_on_batch_size_or_order(criterion: str, name: str) -> None:
    # A cosine on the edge of a bin may fall on either side after fp32 rounding.
    share = 0.9 if CRITERIA[criterion].angles else 1.0
    for order in ("apart", "pairs"):
        other = scored(name, criterion, order)
        for key, values in once(name, criterion).values.items():
            close = torch.isclose(other.values[key], values, rtol=1e-3, atol=1e-5 * values.max().item())
            assert close.float().mean() >= share, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_plan_meets_its_budget_within_a_unit_keeps_the_floors_and_has_the_same_bytes_again(
    criterion: str, allocator: str, name: str
) -> None:
    plan = ordered(name, allocator, once(name, criterion)).plan
    groups = tiny_groups(name, criterion)[1]
    if ALLOCATORS[allocator].floors:
        unit = max(group.parameters.max() for group in groups)
        assert abs(plan.parameters_before - plan.parameters_after - 0.3 * plan.parameters_before) <= unit
        assert all(len(plan.keep[group.key]) >= 0.1 * group.size for group in groups)
    assert all(plan.keep[group.key] for group in groups)
    assert ordered(name, allocator, once(name, criterion)).plan.to_json() == plan.to_json()


@pytest.mark.parametrize("criterion", WIDTHS)
def test_a_plan_keeps_as_many_channels_of_every_expert_and_meets_its_budget(criterion: str) -> None:
    tiny, groups = tiny_groups(EXPERTS, criterion)
    plan = order_units(
        groups, once(EXPERTS, criterion), Budget(0.1, allocator="global"), facts_of(tiny.model, groups)
    ).plan
    unit = max(group.parameters.max() for group in groups)
    assert abs(plan.parameters_before - plan.parameters_after - 0.1 * plan.parameters_before) <= unit
    (experts,) = (group for group in groups if group.unit == "channel-slot")
    kept = [index // experts.heads_per_kv for index in plan.keep[experts.key]]
    assert len({kept.count(expert) for expert in range(experts.kv_heads)}) == 1


@given(st.data(), st.floats(0, 0.3), st.floats(0, 0.3), st.integers(0, 2**16))
@settings(max_examples=40)
def test_beginnings_of_an_order_are_within_a_step_of_their_ratio_and_inside_each_other(
    data: st.DataObject, smaller: float, larger: float, seed: int
) -> None:
    criterion, allocator, name = (data.draw(st.sampled_from(sorted(rows))) for rows in (CRITERIA, ALLOCATORS, NAMES))
    scores, generator = once(name, criterion), torch.Generator().manual_seed(seed)
    noise = {key: value + torch.rand(value.shape, generator=generator) for key, value in scores.values.items()}
    order = ordered(name, allocator, replace(scores, values=noise))
    assert order.plan_at(0.3) is order.plan
    ratios = sorted((smaller, larger))
    first, second = (order.plan_at(ratio) for ratio in ratios)
    for key, kept in first.keep.items():
        assert set(order.plan.keep[key]) <= set(second.keep[key]) <= set(kept)
    step, whole = order.parameters.sum(1).max(initial=0), order.plan.parameters_before
    for plan, ratio in zip((first, second), ratios, strict=True):
        gone = sum(count.parameters_before - count.parameters_after for count in plan.towers.values())
        assert gone == whole - plan.parameters_after
        assert abs(gone - max(ratio * whole, plan.dropped_parameters)) <= step


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cost", COSTS)
def test_what_bundles_cost_is_above_nothing_and_together_what_their_kind_costs(cost: str, name: str) -> None:
    tiny, groups = tiny_groups(name, "random")
    total = COSTS[cost].total(facts_of(tiny.model, groups))
    kinds = dict.fromkeys(total.kinds, 0.0)
    for line in lines_of(groups, once(name, "magnitude"), round_channels=7):
        spent = COSTS[cost].of(line)
        assert spent.dtype == float and spent.shape == line.scores.shape and (spent > 0).all()
        kinds[line.kind] += spent.sum()
    assert kinds == pytest.approx(total.kinds)
    assert 0 < sum(kinds.values()) < total.whole


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_same_data_and_seed_give_the_same_scores_again(criterion: str) -> None:
    again = scored("llava", criterion)
    assert all(torch.equal(again.values[key], values) for key, values in once("llava", criterion).values.items())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "criterion", [name for name, row in CRITERIA.items() if row.units == "width" and name != "random"]
)
def test_where_all_weight_is_in_one_group_of_queries_its_unit_is_the_important_one(criterion: str, name: str) -> None:
    tiny, row = tiny_model(name), CRITERIA[criterion]
    family = find_family(tiny.model.config)
    groups = [group for group in find_groups(tiny.model, family, "kv-group") if group.unit == "kv-group"]
    with torch.no_grad():
        for group in groups:
            for member in (member for member in group.members if not member.norm):
                weight = tiny.model.get_submodule(member.path).weight
                half = weight.shape[member.dim] // 2  # of two KV heads, with their query heads
                weight.narrow(member.dim, 0 if group.layer else half, half).mul_(0.01)
    calibration = None
    if row.statistics:
        calibration = collect(tiny.model, family, groups, [tiny.inputs(4)], row.calibration())
    for group in groups:
        first, second = score_groups(groups, row, calibration, tiny.model).values[group.key].tolist()
        assert (first < second) == bool(group.layer), group.key
