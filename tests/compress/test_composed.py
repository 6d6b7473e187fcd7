"""Towers and text models of many families, in pairs that cover them all: what the job does with each model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from outputs import logits
from plans import make_plan, random_plan
from tiny_models import COVERING, tiny_model
from tiny_processors import tiny_image, tiny_processor
from torch.utils.flop_counter import FlopCounterMode

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.models.checkpoint import load
from slimvlm.compress.models.families import TEXTS, TOWERS, find_family
from slimvlm.compress.models.groups import count_parameters
from slimvlm.compress.models.saving import save_checkpoint, stock_model
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.mask import mask_plan
from slimvlm.serve.judging.roofline import Sizes, count_costs
from slimvlm.serve.judging.shapes import model_shapes

AUTO = transformers.AutoModelForImageTextToText


def third(model):
    """A third of everything that plain config fields can express."""

    def choose(group):
        if not group.part.fields:
            return range(group.size)
        if group.kind == "mlp" and group.part.ratio:
            return range(group.size // 2)  # configs take whole multiples of the block's width: one of two
        if group.kind == "mlp":
            return range(group.size - group.size // 3)
        return [head for head in range(group.size) if head % group.heads_per_kv]  # a query slot leaves

    return make_plan(model, choose, "query-slot", "stock")


def of_other_rows():
    """Pairs of which a row, or the family, is in none before: many text models have the same row."""
    seen = set()
    for name, (model_type, tower, text) in COVERING.items():
        rows = {model_type, TOWERS[tower], TEXTS[text]}
        if rows - seen:
            yield name
        seen |= rows


OTHER_ROWS = list(of_other_rows())


@pytest.mark.parametrize("name", COVERING)
def test_a_pair_is_cut_as_if_masked_and_has_a_stock_form(name):
    tiny = tiny_model(name, "sdpa")
    batch, plan = tiny.inputs(2), random_plan(tiny.model, seed=1)
    masked = logits(mask_plan(copy.deepcopy(tiny.model), plan), batch)
    assert (logits(tiny.model, batch) - masked).abs().max() > 1e-2
    stock_model(apply_plan(copy.deepcopy(tiny.model), third(tiny.model)))  # the unmodified class would build it so
    cut = apply_plan(tiny.model, plan)
    assert count_parameters(cut) == plan.parameters_after < plan.parameters_before
    assert (logits(cut, batch) - masked).abs().max() <= 1e-5


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_a_pair_is_reloaded_in_three_ways(tmp_path, name):
    tiny = tiny_model(name, "sdpa")
    batch, plan, uniform = tiny.inputs(1), random_plan(tiny.model, seed=1), third(tiny.model)
    cut, stock = apply_plan(copy.deepcopy(tiny.model), plan), apply_plan(tiny.model, uniform)
    save_checkpoint(tmp_path / "cut", cut, None, plan)
    save_checkpoint(tmp_path / "stock", stock, None, uniform, "stock")
    assert torch.equal(logits(load(tmp_path / "cut")[0], batch), logits(cut, batch))
    assert torch.equal(
        logits(AUTO.from_pretrained(tmp_path / "cut", trust_remote_code=True), batch), logits(cut, batch)
    )
    loaded, info = AUTO.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded, batch), logits(stock, batch))


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_a_pair_is_evaluated_and_takes_the_operations_that_are_counted(tmp_path, name):
    model = tiny_model(name).model.requires_grad_(False)
    collator = Collator(tiny_processor(name), find_family(model.config), model.config)
    tiny_image(24, 20).save(tmp_path / "image.png")
    samples = [Sample(tmp_path / "image.png", (Turn("how many ?", ("two",)),), "set:0", "count", "noto")]
    [row] = evaluate(model, collator, samples).rows
    batch = collator.training(samples)
    assert row.loss / row.tokens == pytest.approx(model(**batch).loss.item(), abs=2e-4)
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    with FlopCounterMode(display=False) as counter:
        model(**prompt)
    length = prompt["input_ids"].shape[1]
    sizes = Sizes(1, tuple(prompt["pixel_values"].shape), length, 2, first_logits=length)
    costs = count_costs(model_shapes(model, collator.family), sizes, "fp32")
    assert costs["ttft"].total_flops == counter.get_total_flops()
