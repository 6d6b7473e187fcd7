"""The stock layout: whole blocks leave as the loss says, before widths are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model

from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.data.collate import collated, collator_of
from slimvlm.compress.data.samples import load_samples
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.saving import stock_model
from slimvlm.compress.progress import silent
from slimvlm.compress.rounds import Planned, Planning, plan_in_rounds
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.stages.stock_shape import with_stock_shape
from slimvlm.demo import MODEL, SAMPLES

STOCK = Planning(Budget(0.3, allocator="global", layout="stock"), CRITERIA["gate"])
# Dead blocks, MLPs by a ratio, experts, two text towers, and no text: with what the widths alone can give.
RATIOS = {"llava_next": 0.3, "qwen2_vl": 0.15, "qwen3_vl_moe": 0.15, "blip2_t5": 0.3, "siglip": 0.08}


def idle_demo():
    """The demo with a block of the vision tower that does nothing, and samples for it."""
    loaded = load_model(MODEL, dtype=torch.float32)
    block = loaded.model.model.vision_tower.encoder.layers[2]
    for exit in (block.self_attn.out_proj, block.mlp.fc2):
        torch.nn.init.zeros_(exit.weight)
        torch.nn.init.zeros_(exit.bias)
    samples = load_samples(SAMPLES / "train.jsonl", limit=16).samples
    return loaded.model, collated(collator_of(loaded), samples, 16)


def test_a_block_that_does_nothing_leaves_before_widths_do_also_after_an_interruption():
    model, work = idle_demo()
    planning = with_stock_shape(model, work, STOCK, None, silent)
    assert int(planning.worth.values["vision.block"].argmin()) == 2
    seen: list[Planned] = []
    plan = plan_in_rounds(model, lambda _: work, planning, on_round=seen.append).plan
    assert 2 in plan.gone["vision"] and plan.removed_fraction == pytest.approx(0.3, abs=0.002)
    again = with_stock_shape(idle_demo()[0], work, STOCK, seen[0].order, silent)
    assert (again.depth, again.budget) == (planning.depth, planning.budget)
    assert plan_in_rounds(idle_demo()[0], lambda _: work, again, done=seen[0].order).plan == plan


@pytest.mark.parametrize(
    "change",
    [
        {"depth": {"language": 0.0}},
        {"budget": replace(STOCK.budget, layout="per-layer")},
        {"budget": replace(STOCK.budget, kind_ratio={"attention": 0.0})},
        {"budget": replace(STOCK.budget, tower_ratio={"language": 0.3, "vision": 0.0})},
    ],
)
def test_no_block_leaves_that_the_options_speak_of(change):
    model, work = idle_demo()
    planning = replace(STOCK, **change)
    assert "vision" not in with_stock_shape(model, work, planning, None, silent).depth
    assert not any(plan_in_rounds(model, lambda _: work, planning).plan.gone.values())


@pytest.mark.parametrize("name", RATIOS)
def test_the_unmodified_class_builds_what_is_left_and_the_dense_model_stays_as_it_was(name):
    tiny, planning = tiny_model(name, "sdpa"), replace(STOCK, budget=replace(STOCK.budget, ratio=RATIOS[name]))
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    batches = [{"labels": tiny.inputs(3)["input_ids"].clone(), **tiny.inputs(3)}]
    planning = with_stock_shape(tiny.model, batches, planning, None, silent)
    assert all(torch.equal(tiny.model.state_dict()[key], value) for key, value in before.items())
    plan = plan_in_rounds(tiny.model, lambda _: batches, planning).plan
    assert plan.removed_fraction == pytest.approx(planning.budget.ratio, abs=0.02)
    stock_model(apply_plan(tiny_model(name, "sdpa").model, plan))
