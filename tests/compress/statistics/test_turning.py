"""How far blocks turn the residual stream: the published figure, of every block of every family that may leave."""

from __future__ import annotations

import pytest
import torch
from plans import keep_blocks
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_blocks
from slimvlm.compress.slicing.mask import mask_plan
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.collector import Side
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions


def turning(model, *batches) -> dict[str, float]:
    family = find_family(model.config)
    seen = collect(model, family, find_blocks(model, family), batches, CalibrationOptions(("turning",))).seen
    return {path: value.item() for path, value in seen["turning"].items()}


@pytest.mark.parametrize("name", FACTORIES)
def test_every_block_that_may_leave_turns_its_tokens_and_one_that_is_switched_off_does_not(name):
    tiny = tiny_model(name)
    batch = tiny.inputs(2)
    found = turning(tiny.model, batch)
    groups = find_blocks(tiny.model, find_family(tiny.model.config))
    assert list(found) == [path for group in groups for path in group.block_paths]
    assert all(1e-3 < value < 2 for value in found.values())
    again = turning(mask_plan(tiny.model, keep_blocks(tiny.model, lambda group: [group.blocks[0].index])), batch)
    off = {group.block_paths[0] for group in groups}
    assert all((value < 1e-6) == (path in off) for path, value in again.items())


def test_it_is_one_minus_the_cosine_over_the_tokens_that_are_no_padding_however_they_are_batched():
    tiny = tiny_model("llava")
    batch = tiny.inputs(3)
    batch["attention_mask"][0, :3] = 0
    last: list[torch.Tensor] = []
    norm = tiny.model.model.language_model.norm
    handle = norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    with torch.no_grad():
        states = tiny.model(**batch, output_hidden_states=True).hidden_states
    handle.remove()
    mask = batch["attention_mask"].bool()
    found = turning(tiny.model, batch)
    for layer, (before, after) in enumerate([(states[0], states[1]), (states[1], last[0])]):  # before the final norm
        expected = 1 - torch.cosine_similarity(before[mask], after[mask], dim=-1).mean()
        assert found[f"model.language_model.layers.{layer}"] == pytest.approx(expected.item(), abs=1e-6)
    single = [{name: value[index : index + 1] for name, value in batch.items()} for index in (2, 0, 1)]
    assert turning(tiny.model, *single) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_too_large_to_multiply_in_half_precision_are_judged_like_others(dtype):
    block = torch.nn.Linear(8, 8, bias=False).to(dtype)
    block.weight.data.copy_(torch.eye(8) + 0.25 * torch.eye(8).roll(1, 0))
    tokens = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (1, 512):  # products of norms above 65504 overflow in fp16
        collector = STATISTICS["turning"].make()
        with collector.watch([Side("block", block, ())]):
            block((scale * tokens).to(dtype))
            found.append(collector.finish(lambda tensor, how: None)["block"].item())
    assert 0.01 < found[1] == pytest.approx(found[0], rel=1e-3)
