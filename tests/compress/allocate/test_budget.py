"""Plans: golden example G11, exact counts in every family, ratios of towers and kinds, rounding, stock, rounds."""

import re
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_scale import blip2_flan_t5_xl
from tiny_models import FACTORIES, tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.facts import Facts, facts_of
from slimvlm.compress.allocate.pool import proportional_steps
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import Scores, score_groups
from slimvlm.compress.errors import InfeasibleBudgetError
from slimvlm.compress.models.families import FAMILIES, TEXTS, find_family
from slimvlm.compress.models.families.parts import GATED_MLP
from slimvlm.compress.models.groups import Group, count_parameters, find_groups
from slimvlm.compress.models.projections import Member
from slimvlm.compress.models.saving import stock_model
from slimvlm.compress.plan import Plan
from slimvlm.compress.slicing.apply import apply_plan

FLOORED = [name for name, allocator in ALLOCATORS.items() if allocator.floors]


@lru_cache
def dense_llava() -> tuple[tuple[Group, ...], Facts]:
    model, groups, _ = prepared("llava")
    return groups, facts_of(model, groups)


def prepared(name: str, attention_unit: str = "auto", seed: int = 0) -> tuple[nn.Module, tuple[Group, ...], Scores]:
    model = tiny_model(name).model
    if hasattr(model.config, "vision_feature_layer"):
        model.config.vision_feature_layer = -1  # test_dead_blocks.py is about what nobody reads
    groups = find_groups(model, find_family(model.config), attention_unit)
    return model, groups, random_scores(groups, seed)


def random_scores(groups: tuple[Group, ...], seed: int = 0) -> Scores:
    scores = score_groups(groups, CRITERIA["random"], seed=seed)
    return replace(scores, importance={group.key: float(number % 5) for number, group in enumerate(groups)})


def plan_for(name: str, budget: Budget, attention_unit: str = "auto", seed: int = 0) -> tuple[Plan, tuple[Group, ...]]:
    model, groups, scores = prepared(name, attention_unit, seed)
    return plan_units(groups, scores, budget, facts_of(model, groups)), groups


def removed(plan: Plan, groups: tuple[Group, ...], **where: str) -> int:
    """Parameters the plan takes from the groups with these attributes."""
    chosen = [group for group in groups if all(getattr(group, name) == value for name, value in where.items())]
    units = [(1 - len(plan.keep[group.key]) / group.size) * group.num_units for group in chosen]
    return round(sum(count * group.parameters_per_unit for count, group in zip(units, chosen, strict=True)))


def finest_unit(groups: tuple[Group, ...]) -> int:
    return min(group.parameters_per_unit for group in groups)


def single_mlp(values: list[float], unprunable: int = 5) -> tuple[tuple[Group, ...], Scores, Facts]:
    """A gated MLP of hidden size 3 (nine weights per channel) in a model with some more parameters."""
    size = len(values)
    members = (Member("gate", 0, "channel"), Member("up", 0, "channel"), Member("down", 1, "channel"))
    group = Group(
        home=TEXTS["llama"].towers[0], layer=0, part=GATED_MLP, path="b", size=size, unit="channel", num_units=size,
        weights_per_unit=9, parameters_per_unit=9, members=members,
    )  # fmt: skip
    scores = Scores(CRITERIA["taylor"], {group.key: Tensor(values)}, {group.key: torch.arange(size)[:, None]})
    prunable = 9 * size
    facts = Facts(
        FAMILIES[0], PreTrainedConfig(), prunable + unprunable, {"language": prunable}, {"language": prunable},
        {"mlp": prunable, "attention": 0}, {group.key: size},
    )  # fmt: skip
    return (group,), scores, facts


def test_golden_g11_the_ratio_counts_parameters_that_cannot_be_cut():
    plan = plan_units(*single_mlp([3, 1, 2, 4])[:2], Budget(0.2), single_mlp([3, 1, 2, 4])[2])
    assert plan.removed_fraction == pytest.approx(0.219512, abs=1e-6)
    assert plan.keep["language.0.mlp"] == (0, 2, 3)


@pytest.mark.parametrize("allocator", FLOORED)
@pytest.mark.parametrize("name", FACTORIES)
def test_the_cut_model_has_exactly_the_planned_parameters_and_macs(name, allocator):
    model, groups, scores = prepared(name)
    facts = facts_of(model, groups)
    plan = plan_units(groups, scores, Budget(0.2, allocator=allocator), facts)
    assert abs(facts.parameters - plan.parameters_after - 0.2 * facts.parameters) <= finest_unit(groups) / 2
    apply_plan(model, plan)
    after = facts_of(model, find_groups(model, find_family(model.config)))
    assert plan.parameters_after == count_parameters(model)
    for tower, count in plan.towers.items():
        assert (count.parameters_before, count.parameters_after) == (facts.towers[tower], after.towers[tower])
        assert (count.macs_before, count.macs_after) == (facts.macs[tower], after.macs[tower])


@pytest.mark.parametrize("ratio", [0.05, 0.123, 0.2, 0.25])
@pytest.mark.parametrize("name", FACTORIES)
def test_what_goes_is_within_two_thousandths_of_what_was_asked(name, ratio):
    model, groups, scores = prepared(name)
    facts = facts_of(model, groups)
    assert finest_unit(groups) < 0.004 * facts.parameters  # half of one is less
    for allocator in FLOORED:
        plan = plan_units(groups, scores, Budget(ratio, allocator=allocator), facts)
        assert plan.removed_fraction == pytest.approx(ratio, abs=0.002)


def test_half_of_the_paper_s_model_is_planned_within_one_unit():
    model = blip2_flan_t5_xl()
    groups = find_groups(model, find_family(model.config))
    scores = random_scores(groups)
    plan = plan_units(groups, scores, Budget(0.5), facts_of(model, groups))
    assert abs(plan.parameters_after - plan.parameters_before / 2) <= finest_unit(groups) / 2


@pytest.mark.parametrize("unit", ["kv-group", "query-slot"])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_grouped_query_attention_keeps_the_same_number_of_query_heads_per_kv_head(unit, allocator):
    plan, groups = plan_for("llava", Budget(0.3, allocator=allocator), attention_unit=unit)
    for group in groups:
        if group.unit in ("kv-group", "query-slot"):
            counts = Counter(head // group.heads_per_kv for head in plan.keep[group.key])
            assert len(set(counts.values())) == 1
            assert unit == "kv-group" or len(counts) == group.kv_heads


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others():
    texts = [plan_for("llava", Budget(0.3), seed=seed)[0].to_json() for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert Plan.from_json(texts[0]).to_json() == texts[0]


@settings(max_examples=25)
@given(st.floats(0, 0.4), st.sampled_from(FLOORED), st.integers(0, 3))
def test_floors_hold_and_the_lowest_units_of_every_group_go(ratio, allocator, seed):
    groups, facts = dense_llava()
    scores = random_scores(groups, seed)
    plan = plan_units(groups, scores, Budget(ratio, allocator=allocator, floor=0.25), facts)
    for group in groups:
        kept = set(plan.keep[group.key])
        assert len(kept) >= max(0.25 * group.size, group.size // group.num_units)
        stays = [set(unit) <= kept for unit in scores.members[group.key].tolist()]
        ranked = [stays[unit] for unit in scores.values[group.key].argsort(stable=True).tolist()]
        assert ranked == sorted(ranked)


def test_a_tower_loses_its_own_ratio_and_the_others_carry_the_rest():
    facts = dense_llava()[1]
    plan, groups = plan_for("llava", Budget(0.25, tower_ratio={"vision": 0.2}))
    unit = finest_unit(groups)
    assert abs(removed(plan, groups, tower="vision") - 0.2 * facts.towers["vision"]) <= unit
    assert abs(removed(plan, groups) - 0.25 * facts.parameters) <= unit


def test_a_kind_loses_its_own_ratio_of_its_prunable_parameters():
    facts = dense_llava()[1]
    for ratio in (0.0, 0.25):
        plan, groups = plan_for("llava", Budget(0.2, kind_ratio={"attention": ratio}))
        heads = finest_unit([group for group in groups if group.kind == "attention"])
        assert abs(removed(plan, groups, kind="attention") - ratio * facts.kinds["attention"]) <= heads / 2
        assert abs(removed(plan, groups) - 0.2 * facts.parameters) <= finest_unit(groups) / 2


def test_kind_and_tower_ratios_hold_together():
    facts = dense_llava()[1]
    plan, groups = plan_for("llava", Budget(0.2, {"vision": 0.3}, {"attention": 0.1}))
    heads = finest_unit([group for group in groups if group.kind == "attention"])
    assert abs(removed(plan, groups, kind="attention") - 0.1 * facts.kinds["attention"]) <= heads / 2
    assert abs(removed(plan, groups, tower="vision") - 0.3 * facts.towers["vision"]) <= finest_unit(groups)
    assert abs(removed(plan, groups) - 0.2 * facts.parameters) <= finest_unit(groups)


@pytest.mark.parametrize("layout", ["per-layer", "stock"])
@pytest.mark.parametrize("channels", [8, 7, 32])
def test_cut_mlps_keep_a_multiple_of_the_rounded_channels(channels, layout):
    plan, groups = plan_for("llava", Budget(0.1, round_channels=channels, layout=layout))
    widths = {group.key: len(plan.keep[group.key]) for group in groups if group.kind == "mlp"}
    cut = [width for key, width in widths.items() if width < plan.sizes[key]]
    assert cut and all(width % channels == 0 for width in cut)


def test_the_stock_layout_cuts_alike_what_one_config_field_sets_and_nothing_else():
    plan, groups = plan_for("llava", Budget(0.3, layout="stock"))
    widths: dict[tuple[str, str], set[int]] = {}
    for group in groups:
        widths.setdefault((group.tower, group.kind), set()).add(len(plan.keep[group.key]))
    assert all(len(found) == 1 for found in widths.values())
    assert widths["vision", "attention"] == {4}  # no config field builds a CLIP tower with fewer heads
    assert widths["vision", "mlp"] != {48} and widths["language", "mlp"] != {40}
    assert plan.layout == "stock"


@pytest.mark.parametrize("name", FACTORIES)
def test_the_unmodified_class_builds_what_a_stock_plan_leaves(name):
    model, groups, scores = prepared(name)
    stock_model(apply_plan(model, plan_units(groups, scores, Budget(0.05, layout="stock"), facts_of(model, groups))))


def test_a_stock_plan_leaves_a_number_of_heads_that_the_config_takes():
    config = tiny_model("llava").model.config
    config.text_config = LlamaConfig(
        hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=16, intermediate_size=8,
        num_hidden_layers=2, vocab_size=config.text_config.vocab_size,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    groups = find_groups(model, find_family(config))
    scores = score_groups(groups, CRITERIA["random"])
    for ratio, heads in ((0.1, {8, 4}), (0.3, {4, 2})):  # 32 is no multiple of 6
        plan = plan_units(groups, scores, Budget(ratio, layout="stock"), facts_of(model, groups))
        kept = {len(plan.keep[group.key]) for group in groups if group.tower == "language" and group.kind != "mlp"}
        assert len(kept) == 1 and kept < heads


def test_a_width_that_is_a_ratio_in_the_config_leaves_in_whole_multiples_of_the_block():
    plan, groups = plan_for("qwen2_vl", Budget(0.18, layout="stock"))
    widths = [len(plan.keep[group.key]) for group in groups if group.tower == "vision" and group.kind == "mlp"]
    assert widths == [32, 32]  # of 64; the width of the blocks is 32


def test_towers_that_share_a_config_field_cannot_have_a_ratio_of_their_own_in_the_stock_layout():
    with pytest.raises(InfeasibleBudgetError, match="decoder and encoder share their widths"):
        plan_for("blip2_t5", Budget(0.1, tower_ratio={"encoder": 0.2}, layout="stock"))
    plan, groups = plan_for("blip2_t5", Budget(0.1, layout="stock"))
    widths = {len(plan.keep[group.key]) for group in groups if group.tower != "vision" and group.kind == "mlp"}
    assert len(widths) == 1


@pytest.mark.parametrize(
    "budget",
    [Budget(0.9), Budget(0.9, layout="stock"), Budget(0.9, tower_ratio={"vision": 0.1}), Budget(0.5, {"vision": 0.95})],
    ids=["ratio", "stock", "rest", "tower"],
)
def test_an_impossible_ratio_is_refused_with_the_largest_possible_one(budget):
    with pytest.raises(InfeasibleBudgetError, match=r"largest possible here is 0\.\d{4}") as error:
        plan_for("llava", budget)
    largest = float(re.search(r"is (0\.\d{4})", str(error.value))[1])
    for ratio, possible in ((largest, True), (largest + 2e-4, False)):
        tower = {"vision": ratio} if str(error.value).startswith("vision") else budget.tower_ratio
        changed = Budget(budget.ratio if tower is not budget.tower_ratio else ratio, tower, layout=budget.layout)
        if possible:
            plan_for("llava", changed)
        else:
            with pytest.raises(InfeasibleBudgetError):
                plan_for("llava", changed)


def test_ratios_that_contradict_each_other_are_refused():
    with pytest.raises(
        InfeasibleBudgetError, match=r"ratio 0\.01 is less than the other ratios remove already; raise it"
    ):
        plan_for("llava", Budget(0.01, tower_ratio={"vision": 0.6, "language": 0.6}))
    with pytest.raises(InfeasibleBudgetError, match="nothing is left to remove"):
        plan_for("llava", Budget(0.6, tower_ratio={"vision": 0.1, "language": 0.1}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, "ratio 1 is no fraction"),
        ({"ratio": 0.1, "tower_ratio": {"vision": -0.1}}, r"vision -0\.1 is no fraction"),
        ({"ratio": 0.1, "kind_ratio": {"norm": 0.1}}, "kind 'norm' is unknown; choose one of attention, mlp"),
        ({"ratio": 0.1, "allocator": "best"}, f"choose one of {', '.join(ALLOCATORS)}"),
        ({"ratio": 0.1, "cost": "dollars"}, "cost 'dollars' is unknown; choose one of parameters"),
        ({"ratio": 0.1, "layout": "flat"}, "choose one of per-layer, stock"),
        ({"ratio": 0.1, "round_channels": 0}, "accepted is 1 or more"),
        ({"ratio": 0.1, "allocator": "paper", "layout": "stock"}, "one ratio for all parts"),
    ],
)
def test_budgets_no_plan_can_have_are_refused(arguments, message):
    with pytest.raises(InfeasibleBudgetError, match=message):
        Budget(**arguments)


def test_an_unknown_tower_is_refused_with_the_known_ones():
    with pytest.raises(InfeasibleBudgetError, match="tower 'audio' is unknown; this model has vision, language"):
        plan_for("llava", Budget(0.1, tower_ratio={"audio": 0.1}))


def test_the_paper_s_loop_may_empty_a_group_and_the_plan_keeps_its_best_unit():
    groups, scores, facts = single_mlp([1, 1, 1, 1, 5, 5])
    literal = plan_units(groups, scores, Budget(0.7, allocator="paper"), facts)
    assert literal.keep["language.0.mlp"] == (5,) and literal.rescued == ("language.0.mlp",)
    product = plan_units(groups, scores, Budget(0.7), facts)
    assert product.keep["language.0.mlp"] == (5,) and product.rescued == ()


def test_the_steps_of_the_paper_s_loop_can_be_in_proportion_to_the_model():
    model, groups, scores = prepared("llava")
    facts = facts_of(model, groups)
    letter, proportion = (
        plan_units(groups, scores, Budget(0.3, allocator="paper", steps=steps), facts)
        for steps in (None, proportional_steps(sum(group.num_units for group in groups)))
    )
    assert proportion.removed_fraction == pytest.approx(0.3, abs=0.03)  # one step and what ties with its last unit
    assert letter.removed_fraction > 0.5  # 1000 units are more than there are
    assert proportional_steps(488_304) == (976, 97)


def test_rounds_count_from_the_dense_model():
    model, groups, scores = prepared("llava")
    dense = facts_of(model, groups)
    budget = Budget(0.3, tower_ratio={"vision": 0.3}, kind_ratio={"attention": 0.25})
    composed = None
    for share in (0.4, 0.8, 1.0):
        groups = find_groups(model, find_family(model.config))
        scores = random_scores(groups, 7)
        later = plan_units(groups, scores, budget.scaled(share), facts_of(model, groups, dense=dense))
        apply_plan(model, later)
        composed = later if composed is None else composed.compose(later)
    unit = finest_unit(groups)
    assert abs(dense.parameters - count_parameters(model) - 0.3 * dense.parameters) <= unit
    assert composed.parameters_after == count_parameters(model) and composed.ratio == 0.3
    assert composed.parameters_before == dense.parameters
    after = facts_of(model, find_groups(model, find_family(model.config)))
    assert abs(dense.towers["vision"] - after.towers["vision"] - 0.3 * dense.towers["vision"]) <= unit
    assert all(len(kept) >= 0.1 * composed.sizes[key] for key, kept in composed.keep.items())


def test_the_paper_s_loop_says_how_much_it_can_remove():
    groups, scores, facts = single_mlp([1, 2, 3, 4, 5, 6], unprunable=54)
    with pytest.raises(InfeasibleBudgetError, match=r"ratio 0\.9 cannot be reached: .* the paper's loop.* at most 54"):
        plan_units(groups, scores, Budget(0.9, allocator="paper"), facts)


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_llm_pruner_leaves_the_ends_of_every_tower_whole_while_the_middle_can_give(name: str) -> None:
    model, groups, scores = prepared(name)
    depths = {
        tower: 1 + max(group.layer for group in groups if group.tower == tower) for tower in {g.tower for g in groups}
    }
    middle = [group for group in groups if 0 < group.layer < depths[group.tower] - 1]
    facts = facts_of(model, groups)
    share = sum(group.parameters.sum() for group in middle) / facts.parameters
    plan = plan_units(groups, scores, Budget(share / 2, allocator="llm-pruner"), facts)
    whole = {group.key for group in groups if len(plan.keep[group.key]) == group.size}
    assert whole >= {group.key for group in groups} - {group.key for group in middle}
    assert bool(middle) == (len(whole) < len(groups))
