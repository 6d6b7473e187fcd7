"""Blocks leave first, then widths make up for the rest: one plan, one order, for every family."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
from outputs import logits
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.errors import InfeasibleBudgetError, UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters, find_blocks, find_groups
from slimvlm.compress.plan import Plan
from slimvlm.compress.rounds import Planned, Planning, check_budget, plan_in_rounds
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.mask import mask_plan
from slimvlm.compress.statistics.rows import token_rule


def planning_for(model, between: str = "none", allocator: str = "global") -> Planning:
    """Nearly half of the last tower that can lose a block, and a little of the rest."""
    tower = find_blocks(model, find_family(model.config))[-1].tower
    facts = facts_of(model, ())
    gone = facts.towers[tower] / 2 + sum(one.parameters for one in facts.dead.values())
    return Planning(
        Budget(gone / facts.parameters + 0.15, allocator=allocator),
        CRITERIA["gate"], rounds=2, depth={tower: 0.45}, between=between,
    )  # fmt: skip


def planned(name: str, between: str = "none", done: Order | None = None, allocator: str = "global") -> list[Planned]:
    tiny, seen = tiny_model(name, "sdpa"), []
    batches = [{"labels": tiny.inputs(3)["input_ids"].clone(), **tiny.inputs(3)}]
    planning = planning_for(tiny.model, between, allocator)
    plan_in_rounds(tiny.model, lambda _: batches, planning, done=done, on_round=seen.append)
    return seen


@pytest.mark.parametrize("name", sorted(set(FACTORIES) - {"qwen3_vl"}))  # as in slicing/test_depth.py
def test_the_composed_plan_meets_the_ratio_and_is_the_dense_model_with_all_of_it_switched_off(name):
    tiny = tiny_model(name, "sdpa")
    planning = planning_for(tiny.model)
    check_budget(copy.deepcopy(tiny.model).to("meta"), planning)
    plan = planned(name)[-1].plan
    (tower,) = planning.depth
    blocks = {group.tower: len(group.blocks) for group in find_blocks(tiny.model, find_family(tiny.model.config))}
    assert len(plan.gone[tower]) == max(1, blocks[tower] // 2) and not any(
        gone for other, gone in plan.gone.items() if other != tower
    )
    unit = max(group.parameters.max() for group in find_groups(tiny.model, find_family(tiny.model.config)))
    assert abs(plan.removed_fraction - planning.budget.ratio) <= unit / plan.parameters_before
    assert plan.options["depth_ratio"] == {tower: 0.45} and plan.criterion == "gate"
    batch = tiny.inputs(2)
    masked = logits(mask_plan(copy.deepcopy(tiny.model), Plan.from_json(plan.to_json())), batch)
    model = apply_plan(tiny.model, plan)
    assert count_parameters(model) == plan.parameters_after
    assert (logits(model, batch) - masked).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "between", "allocator"), [("llava", "none", "ecoflap-first"), ("blip2_t5", "refit", "global")]
)
def test_a_killed_plan_goes_on_to_the_same_bytes_from_every_step(name, between, allocator):
    found = planned(name, between, allocator=allocator)
    assert [len(one.order.rounds) for one in found] == [1, 2, 3]
    for step in (0, 1):
        again = planned(name, between, found[step].order, allocator)
        assert again[-1].order.digest == found[-1].order.digest


def test_its_beginnings_are_blocks_alone_until_all_of_them_left(tmp_path: Path):
    order = planned("llava")[-1].order
    order.save(tmp_path / "order.safetensors")
    order = Order.read(tmp_path / "order.safetensors")
    gone = order.parameters[: order.rounds[0]].sum() + order.plan.dropped_parameters
    blocks = gone / order.plan.parameters_before
    for ratio, widths in ((0.0, False), (blocks - 0.01, True), (blocks + 0.05, True)):
        plan = order.plan_at(ratio)
        assert any(key.endswith(".mlp") for key in plan.keep) == widths
        model = apply_plan(tiny_model("llava").model, plan)
        assert count_parameters(model) == plan.parameters_after


def test_blocks_are_judged_by_the_tokens_of_the_criterion():
    model = tiny_model("llava").model
    dense = facts_of(model, ())
    for name, tokens, expected in (("obs", token_rule("text"), "text"), ("ukmi", CRITERIA["ukmi"].tokens, "all")):
        planning = Planning(Budget(0.4), replace(CRITERIA[name], tokens=tokens), depth={"language": 0.45})
        step = planning.step(1, dense, None)
        assert (step.criterion.name, step.criterion.tokens.name) == ("influence", expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": Budget(0.3, allocator="paper"), "rounds": 1},
        {"budget": Budget(0.3, kind_ratio={"mlp": 0.1})},
        {"criterion": CRITERIA["influence"]},
    ],
)
def test_what_excludes_blocks_that_leave_first_is_refused(changes):
    options = {"budget": Budget(0.3), "criterion": CRITERIA["gate"], "rounds": 2, "depth": {"language": 0.2}, **changes}
    with pytest.raises(UnsuitableOptionError, match="--depth-ratio takes whole blocks before the widths"):
        Planning(**options)


def test_a_tower_without_such_blocks_and_a_ratio_that_they_exceed_are_refused():
    model = tiny_model("llava").model
    with pytest.raises(InfeasibleBudgetError, match="depth ratio of audio: there is no such tower whose blocks can"):
        check_budget(model, Planning(Budget(0.3), CRITERIA["gate"], depth={"audio": 0.2}))
    with pytest.raises(InfeasibleBudgetError, match=r"ratio 0\.05 is less than the other ratios remove already"):
        check_budget(model, Planning(Budget(0.05), CRITERIA["gate"], depth={"language": 0.5}))
