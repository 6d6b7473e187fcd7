"""The order of removal: its beginnings are plans of their own, of every family and every way of planning; its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.allocate.budget import Budget, order_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.errors import OutputError, UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters, find_units
from slimvlm.compress.plan import Plan
from slimvlm.compress.rounds import Planning, plan_in_rounds
from slimvlm.compress.slicing.apply import apply_plan

RATIOS = (0.0, 0.05, 0.12, 0.2)


def ordered(name: str, rounds: int = 3, criterion: str = "magnitude", **changes: Any) -> Order:
    tiny = tiny_model(name)
    asked = {"attention_unit": changes.pop("attention_unit", "auto")}
    planning = Planning(Budget(**{"ratio": 0.25, **changes}), CRITERIA[criterion], rounds=rounds, **asked)
    return plan_in_rounds(tiny.model, lambda _: [tiny.inputs(2)], planning).order


def assert_begins_in_every_ratio(name: str, order: Order) -> list[Plan]:
    """Every beginning is a plan that can be carried out, within a step of its ratio, and inside the larger ones."""
    whole, plans = order.plan, [order.plan_at(ratio) for ratio in RATIOS]
    largest = order.parameters.sum(1).max(initial=0)
    for plan, larger in zip(plans, [*plans[1:], whole], strict=True):
        assert all(set(larger.keep[key]) <= set(kept) for key, kept in plan.keep.items())
        gone, asked = plan.parameters_before - plan.parameters_after, plan.ratio * plan.parameters_before
        assert abs(gone - max(asked, plan.dropped_parameters)) <= largest
        assert plan.prefix_of == whole.ratio == 0.25
        assert count_parameters(apply_plan(tiny_model(name).model, Plan.from_json(plan.to_json()))) == (
            plan.parameters_after
        )
    return plans


@pytest.mark.parametrize("name", FACTORIES)
def test_every_beginning_is_a_plan_inside_the_larger_ones_for_every_family(name: str) -> None:
    order = ordered(name)
    assert len(order.rounds) == 3 and order.plan.rounds == 3 and order.plan.prefix_of is None
    assert_begins_in_every_ratio(name, order)
    assert order.plan_at(0.25).to_json() == order.plan.to_json()
    tiny = tiny_model(name)
    groups = find_units(tiny.model, find_family(tiny.model.config), "width")
    assert all(len(order.plan.keep[group.key]) >= max(1, 0.1 * group.size) for group in groups)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llava", {"layout": "stock"}),
        ("llava", {"round_channels": 4}),
        ("llava", {"criterion": "influence", "layout": "stock"}),
        ("blip2_t5", {"allocator": "local"}),
        ("blip2_t5", {"allocator": "paper", "rounds": 1}),
        ("qwen2_5_vl", {"attention_unit": "kv-group", "allocator": "balanced"}),
        ("smolvlm", {"kind_ratio": {"attention": 0.1}, "tower_ratio": {"vision": 0.3}}),
    ],
)
def test_beginnings_are_plans_however_it_was_planned(name: str, changes: dict[str, Any]) -> None:
    order = ordered(name, **changes)
    plans = assert_begins_in_every_ratio(name, order)
    cut = [
        (key, len(kept))
        for plan in (*plans, order.plan)
        for key, kept in plan.keep.items()
        if len(kept) < plan.sizes[key]
    ]
    assert cut and not any(key.endswith("mlp") and width % changes.get("round_channels", 1) for key, width in cut)


def test_a_kind_with_a_ratio_of_its_own_loses_in_proportion() -> None:
    order = ordered("llava", kind_ratio={"mlp": 0.4}, rounds=1)

    def lost(plan: Plan) -> float:
        mlps = [key for key in plan.keep if key.endswith(".mlp")]
        return 1 - sum(len(plan.keep[key]) for key in mlps) / sum(plan.sizes[key] for key in mlps)

    free = order.plan.dropped_parameters / order.plan.parameters_before
    assert lost(order.plan) == pytest.approx(0.4, abs=0.02)
    assert lost(order.plan_at((0.25 + free) / 2)) == pytest.approx(0.2, abs=0.05)


def test_dead_blocks_and_rescued_groups_are_told_of_the_beginning() -> None:
    order = ordered("blip2_t5", allocator="paper", rounds=1, ratio=0.55)
    begun = order.plan_at(0.05)
    assert order.plan.rescued and set(begun.rescued) < set(order.plan.rescued)
    assert begun.dropped == order.plan.dropped


def test_more_than_the_order_took_is_refused_with_what_to_do() -> None:
    order = ordered("llava")
    for ratio in (0.26, 1.0, -0.1, float("nan")):
        with pytest.raises(
            UnsuitableOptionError, match=r"not within the 0\.25 this plan was made for; ask for at most"
        ):
            order.plan_at(ratio)


def test_where_there_is_nothing_to_choose_among_dead_blocks_leave_and_no_step_is_made() -> None:
    model = tiny_model("llava").model
    order = order_units((), score_groups((), CRITERIA["random"]), Budget(0.05), facts_of(model, ()))
    assert (
        order.rounds == (0,) and order.plan.dropped and order.plan_at(0.01).parameters_after < count_parameters(model)
    )


def test_an_interrupted_order_goes_on_to_the_same_one() -> None:
    tiny, planning, seen = tiny_model("llava"), Planning(Budget(0.3), CRITERIA["magnitude"], rounds=3), []
    whole = plan_in_rounds(tiny.model, lambda _: [], planning, on_round=lambda planned: seen.append(planned.order))
    for begun in seen[:2]:
        again = plan_in_rounds(tiny_model("llava").model, lambda _: [], planning, done=begun)
        assert again.order.digest == whole.order.digest
    assert [order.rounds for order in seen] == [whole.order.rounds[:count] for count in (1, 2, 3)]


# ------------------------------------------------------------------ the file


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Order, Path]:
    order, path = ordered("llava"), tmp_path_factory.mktemp("order") / "order.safetensors"
    order.save(path)
    return order, path


def test_the_file_gives_the_order_again(saved: tuple[Order, Path]) -> None:
    order, path = saved
    read = Order.read(path)
    assert read.plan == order.plan and read.rounds == order.rounds and read.digest == order.digest
    assert read.plan_at(0.1).to_json() == order.plan_at(0.1).to_json()


def parts_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
    "no file": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "scores": lambda path: save_file({"values/a": torch.ones(2)}, path),
    "swapped": lambda path: changed(path, lambda tensors: tensors["parameters"].copy_(tensors["parameters"].flip(0))),
    "a tensor less": lambda path: changed(path, lambda tensors: tensors.pop("macs")),
    "a group less": lambda path: changed(path, lambda tensors: tensors.pop(next(n for n in tensors if "/" in n))),
    "of another type": lambda path: changed(path, lambda tensors: tensors.update(macs=tensors["macs"].bool())),
    "flat": lambda path: changed(path, lambda tensors: tensors.update(macs=tensors["macs"].flatten())),
}


def changed(path: Path, change: Any) -> None:
    tensors, header = parts_of(path)
    change(tensors)
    save_file(tensors, path, header)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name(saved: tuple[Order, Path], damage: str, tmp_path: Path) -> None:
    path = tmp_path / "order.safetensors"
    path.write_bytes(saved[1].read_bytes())
    DAMAGES[damage](path)
    with pytest.raises(OutputError, match=r"order\.safetensors .*; make it again"):
        Order.read(path, OutputError, "make it again")


def test_an_order_that_contradicts_its_plan_is_none() -> None:
    order = ordered("llava", rounds=1)
    key = next(iter(order.left))
    other = {**order.left, key: np.where(order.left[key] < 0, 0, -1)}
    for changes, words in (
        ({"left": other}, "takes a unit|keeps others in group"),
        ({"left": {}}, "groups of the plan are others"),
        ({"rounds": ()}, "do not end one after the other"),
        ({"rounds": (order.steps + 1,)}, "must be"),
        ({"rounds": (order.steps, 1)}, "do not end one after the other"),
        ({"parameters": order.parameters - 10**6}, "none below 0"),
        ({"parameters": order.parameters + 1}, "not what the plan removes"),
        ({"left": {name: np.where(left == 0, 1, left) for name, left in order.left.items()}}, "takes a unit"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(order, **changes)
    with pytest.raises(ValueError, match="the later plan expects"):
        order.compose(ordered("llava", rounds=1))
