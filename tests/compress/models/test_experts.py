"""Experts apart and together: they compute the same, are cut alike, and a checkpoint has them as transformers does."""

from __future__ import annotations

import copy

import pytest
import torch
from outputs import logits
from plans import keep_blocks, make_plan, random_plan
from tiny_models import tiny_model

from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.errors import CheckpointError, UnsupportedModelError
from slimvlm.compress.models.checkpoint import load, load_model
from slimvlm.compress.models.experts import ExpertsApart, put_together, take_apart, together
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.statistics.collect import collect

BLOCK = "model.language_model.layers.1.mlp"
WIDTH = 16


def experts_of(model):
    return model.get_submodule(f"{BLOCK}.experts")


def group_of(model):
    return next(group for group in find_groups(model, find_family(model.config)) if group.part.key == "experts")


def first_channels(count):
    """A plan that keeps the first channels of every expert and everything else."""

    def choose(group):
        return [index for index in range(group.size) if group.part.key != "experts" or index % WIDTH < count]

    return choose


def ignoring(tiny):
    """The model with a router that never picks the last two experts."""
    gate = tiny.model.get_submodule(f"{BLOCK}.gate")
    gate.weight.data[1:] = -gate.weight.data[:1] * torch.tensor([[1.0], [0.5], [0.0]])
    gate.top_k = 1
    return tiny


def test_experts_apart_compute_what_the_stacked_ones_do():
    tiny = tiny_model("qwen3_vl_moe", "sdpa")
    batch, expected = tiny.inputs(2), logits(tiny.model, tiny.inputs(2))
    assert isinstance(experts_of(tiny.model), ExpertsApart)
    with together(tiny.model):
        assert experts_of(tiny.model).gate_up_proj.shape == (4, 2 * WIDTH, 32)
        torch.testing.assert_close(logits(tiny.model, batch), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(tiny.model, batch), expected)


def test_a_state_dict_has_the_tensors_of_the_unmodified_class():
    model = tiny_model("qwen3_vl_moe").model
    apart = model.state_dict()
    with together(model):
        stacked = model.state_dict()
    assert apart.keys() == stacked.keys()
    assert all(torch.equal(apart[name], stacked[name]) for name in apart)


def test_taking_experts_apart_copies_no_weight():
    model = tiny_model("qwen3_vl_moe").model
    put_together(model)
    place = experts_of(model).down_proj.data_ptr()
    take_apart(model, find_family(model.config))
    assert experts_of(model)[0].down_proj.weight.data_ptr() == place


def test_experts_with_biases_are_refused():
    model = tiny_model("qwen3_vl_moe").model
    put_together(model)
    experts_of(model).has_bias = True
    with pytest.raises(UnsupportedModelError, match="experts of family 'qwen3_vl_moe' are stored in a way"):
        take_apart(model, find_family(model.config))


def test_a_unit_is_a_channel_of_every_expert_and_a_token_meets_those_that_are_picked():
    group = group_of(tiny_model("qwen3_vl_moe").model)
    assert (group.size, group.num_units, group.kv_heads, group.kind) == (4 * WIDTH, WIDTH, 4, "mlp")
    assert group.weights_per_unit == 4 * 3 * 32
    assert set(group.macs.tolist()) == {2 * 3 * 32}  # two of four experts are picked


@pytest.mark.parametrize("kept", [[0, 1, 16, 32, 48], [0, 16, 32]])
def test_experts_that_would_keep_different_widths_are_refused(kept):
    tiny = tiny_model("qwen3_vl_moe")

    def uneven(group):
        return kept if group.part.key == "experts" else range(group.size)

    with pytest.raises(ValueError, match="every expert must keep the same number of channels"):
        apply_plan(tiny.model, make_plan(tiny.model, uneven))


@pytest.mark.parametrize("count", [8, 5])
def test_a_cut_checkpoint_holds_stacked_experts_and_runs_them_whatever_their_width(tmp_path, count):
    tiny = tiny_model("qwen3_vl_moe", "sdpa")
    cut = apply_plan(tiny.model, make_plan(tiny.model, first_channels(count)))
    expected = logits(cut, tiny.inputs(2))
    save_checkpoint(tmp_path / "cut", cut, None, None)
    model, _ = load(tmp_path / "cut")
    assert experts_of(model).down_proj.shape == (4, 32, count)
    torch.testing.assert_close(logits(model, tiny.inputs(2)), expected, rtol=0, atol=1e-5)


def test_the_unmodified_class_takes_experts_whose_width_its_kernel_can_read(tmp_path):
    tiny = tiny_model("qwen3_vl_moe", "sdpa")
    cut = apply_plan(copy.deepcopy(tiny.model), make_plan(tiny.model, first_channels(8), layout="stock"))
    save_checkpoint(tmp_path / "stock", cut, None, None, layout="stock")
    loaded = load_model(tmp_path / "stock").model
    assert loaded.config.text_config.moe_intermediate_size == 8 and not hasattr(loaded.config, "slimvlm")
    torch.testing.assert_close(logits(loaded, tiny.inputs(2)), logits(cut, tiny.inputs(2)), rtol=0, atol=1e-5)
    odd = apply_plan(tiny.model, make_plan(tiny.model, first_channels(5), layout="stock"))
    with pytest.raises(CheckpointError, match=r"multiple of 8 channels in an expert, and language\.1\.experts has 5"):
        save_checkpoint(tmp_path / "odd", odd, None, None, layout="stock")


@pytest.mark.parametrize("name", [name for name, row in CRITERIA.items() if row.units == "width" and row.statistics])
def test_an_expert_that_no_token_was_sent_to_is_ranked_by_the_size_of_its_weights(name):
    tiny = ignoring(tiny_model("qwen3_vl_moe", "sdpa"))
    group, criterion = group_of(tiny.model), CRITERIA[name]
    seen = collect(tiny.model, find_family(tiny.model.config), [group], [tiny.inputs(2)], criterion.calibration())
    scores = score_groups([group], criterion, seen, tiny.model)
    order = scores.members[group.key][:, 3] - 3 * WIDTH
    expert = experts_of(tiny.model)[3]
    rows, output = (getattr(expert, part).weight.detach().abs().double() for part in ("gate_up_proj", "down_proj"))
    columns = name in ("wanda-sp", "flap")  # they look at output projections alone
    size = output.sum(0) + (0 if columns else rows.sum(1).view(2, WIDTH).sum(0))
    assert order.tolist() == size.argsort().tolist()
    assert (scores.values[group.key] > 0).any()


@pytest.mark.parametrize("name", [name for name, row in COMPENSATIONS.items() if row.place])
def test_a_compensation_leaves_an_expert_that_no_token_was_sent_to_as_it_is(name):
    tiny = ignoring(tiny_model("qwen3_vl_moe", "sdpa"))
    group = group_of(tiny.model)
    keep = {group.key: make_plan(tiny.model, first_channels(8)).keep[group.key]}
    fitted = COMPENSATIONS[name](tiny.model, find_family(tiny.model.config), [group], keep, [lambda: tiny.inputs(2)])
    changed = set() if name == "bias" else {f"{BLOCK}.experts.{expert}.down_proj" for expert in (0, 1)}
    assert set(fitted.weights) == changed
    assert all(bias is None for _, bias in fitted.weights.values())  # stacked, they have none


def test_padding_that_is_sent_to_an_expert_does_not_count():
    tiny = tiny_model("qwen3_vl_moe", "sdpa")
    group, family = group_of(tiny.model), find_family(tiny.model.config)
    batch = tiny.inputs(1)
    padded = {
        key: torch.cat([value, torch.full((1, 3), -100 if key == "labels" else 0)], dim=1)
        if key in ("input_ids", "attention_mask", "labels", "mm_token_type_ids")
        else value
        for key, value in batch.items()
    }
    options = CRITERIA["wanda-sp"].calibration()
    plain, more = (collect(tiny.model, family, [group], [one], options).seen["input-norms"] for one in (batch, padded))
    for path, norms in plain.items():
        torch.testing.assert_close(more[path], norms, rtol=1e-4, atol=1e-5)


def test_a_block_with_experts_leaves_whole_and_what_numbers_the_others_follows():
    tiny = tiny_model("qwen3_vl_moe", "sdpa")
    plan = keep_blocks(tiny.model, lambda group: [1] if group.tower == "language" else [])
    cut = apply_plan(tiny.model, plan)
    assert cut.config.text_config.mlp_only_layers == [0]
    assert not any(isinstance(module, ExpertsApart) for module in cut.modules())


def test_a_model_may_be_cut_twice():
    tiny = tiny_model("qwen3_vl_moe", "sdpa")
    once = apply_plan(tiny.model, random_plan(tiny.model, seed=6))
    twice = apply_plan(once, random_plan(once, seed=7))
    assert torch.isfinite(logits(twice, tiny.inputs(1))).all()
