"""Cutting a model: equal to the dense model with the same units zeroed, for every family and every kind of plan."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from outputs import greedy_tokens, logits, sure_tokens
from plans import make_plan, random_choice, random_plan
from tiny_models import EVERY, tiny_model

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters, find_groups
from slimvlm.compress.models.modeling_slim import shrink, slim_class
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.mask import mask_plan

GENERATING = [name for name in EVERY if name not in ("clip", "siglip")]
TOLERANCES = {"qwen3_5": 1e-4}  # its linear attention divides by norms of its queries and keys
GROUPED = [name for name in GENERATING if not name.startswith("blip2")]


def cut_and_masked(tiny, plan):
    return apply_plan(copy.deepcopy(tiny.model), plan), mask_plan(copy.deepcopy(tiny.model), plan)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", EVERY)
def test_cut_equals_mask_for_another_width_in_every_layer(name, attention):
    tiny = tiny_model(name, attention)
    batch = tiny.inputs(2)
    plan = random_plan(tiny.model, seed=1)
    cut, masked = cut_and_masked(tiny, plan)
    assert count_parameters(cut) == plan.parameters_after < plan.parameters_before
    expected = logits(masked, batch)
    assert (logits(cut, batch) - expected).abs().max() <= TOLERANCES.get(name, 1e-5)
    assert (logits(tiny.model, batch) - expected).abs().max() > 1e-2  # the plan does remove something
    if name in GENERATING:
        assert greedy_tokens(cut, batch, 3) == greedy_tokens(masked, batch, 3)


@pytest.mark.parametrize("unit", ["kv-group", "query-slot"])
@pytest.mark.parametrize("name", GROUPED)
def test_cut_equals_mask_when_kv_heads_are_shared(name, unit):
    tiny = tiny_model(name, "sdpa")

    def one_unit(group):
        if group.kind == "mlp" or group.unit == "head":
            return range(group.size)
        if unit == "kv-group":
            return range(group.heads_per_kv)  # the query heads of KV head 0
        return [kv * group.heads_per_kv + (kv + group.layer) % group.heads_per_kv for kv in range(group.kv_heads)]

    plan = make_plan(tiny.model, one_unit, unit)
    cut, masked = cut_and_masked(tiny, plan)
    family = find_family(cut.config)
    grouped = [group for group in find_groups(cut, family) if group.tower == "language" and group.kind == "attention"]
    assert {(group.size, group.kv_heads) for group in grouped} == {(2, 1) if unit == "kv-group" else (2, 2)}
    batch = tiny.inputs(2)
    assert (logits(cut, batch) - logits(masked, batch)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_two_cuts_equal_the_composed_plan(name):
    tiny = tiny_model(name, "sdpa")
    first = random_plan(tiny.model, seed=4)
    twice = apply_plan(copy.deepcopy(tiny.model), first)
    second = random_plan(twice, seed=5)
    apply_plan(twice, second)
    once = apply_plan(copy.deepcopy(tiny.model), first.compose(second))
    for name, tensor in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], tensor, rtol=1e-6, atol=0)
    assert twice.config.slimvlm == once.config.slimvlm
    batch = tiny.inputs(2)
    assert (logits(once, batch) - logits(twice, batch)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_that_keeps_everything_changes_nothing(name):
    tiny = tiny_model(name)
    before, expected = weights(tiny.model), logits(tiny.model, tiny.inputs(1))
    cut = apply_plan(tiny.model, make_plan(tiny.model, lambda group: range(group.size)))
    left = cut.state_dict()
    assert same_weights({name: before[name] for name in left}, left)
    unread = name.startswith("llava") and name != "llava_onevision"  # nobody reads their last vision block
    assert len(left) == len(before) or unread
    assert torch.equal(logits(cut, tiny.inputs(1)), expected)


@settings(max_examples=20)
@given(st.data())
def test_any_kept_set_gives_cut_equal_to_mask(data):
    tiny = tiny_model("llava", "sdpa")

    def choose(group):
        per_kv = group.heads_per_kv
        count = group.kv_heads or group.size
        kept = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
        slots = data.draw(st.integers(1, per_kv))
        draw_slots = st.sets(st.integers(0, per_kv - 1), min_size=slots, max_size=slots)
        return [unit * per_kv + slot for unit in kept for slot in data.draw(draw_slots)]

    plan = make_plan(tiny.model, choose)
    cut, masked = cut_and_masked(tiny, plan)
    assert count_parameters(cut) == plan.parameters_after
    batch = tiny.inputs(1)
    assert (logits(cut, batch) - logits(masked, batch)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llava", "internvl", "blip2_opt", "blip2_t5"])
def test_gradients_of_the_cut_model_are_the_kept_part_of_the_masked_ones(name):
    tiny = tiny_model(name)
    plan = random_plan(tiny.model, seed=2)
    cut, masked = cut_and_masked(tiny, plan)
    for model in (cut, masked):
        model(**tiny.inputs(2)).loss.backward()
    got, expected = (dict(model.named_parameters()) for model in (cut, masked))
    untouched = [path for path in got if path.removesuffix(".weight") not in cut.config.slimvlm["shapes"]]
    for path in untouched:
        if expected[path].grad is not None and got[path].shape == expected[path].shape:
            torch.testing.assert_close(got[path].grad, expected[path].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["blip2_t5", "llava"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    tiny = tiny_model(name)
    cut = apply_plan(tiny.model, random_plan(tiny.model, seed=2)).train()
    for module in cut.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") or hasattr(module, "dropout"):
            for field in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, field, None), float):
                    setattr(module, field, 0.0)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            cut.gradient_checkpointing_enable({"use_reentrant": False})
        cut.zero_grad()
        cut(**tiny.inputs(2)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in cut.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for path in gradients[0]:
        torch.testing.assert_close(gradients[0][path], gradients[1][path], rtol=1e-5, atol=1e-7)


def test_t5_with_a_static_cache_generates_the_tokens_of_the_masked_model():
    tiny = tiny_model("blip2_t5", "sdpa")
    cut, masked = cut_and_masked(tiny, random_plan(tiny.model, seed=6))
    prompt = {name: value for name, value in tiny.inputs(2).items() if name != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    tokens = [sure_tokens(model, prompt, **options).tolist() for model in (cut, masked)]
    assert tokens[0] == tokens[1]


def test_dtype_requires_grad_and_ties_stay():
    tiny = tiny_model("paligemma")  # its head is tied to its embedding
    model = tiny.model.to(torch.bfloat16)
    frozen = "model.language_model.layers.0.mlp.up_proj.weight"
    model.get_parameter(frozen).requires_grad_(False)
    apply_plan(model, random_plan(model, seed=1))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [frozen]
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_dense_tensors_are_freed():
    model = tiny_model("llava").model
    old = [weakref.ref(model.get_parameter(f"model.language_model.layers.{n}.mlp.up_proj.weight")) for n in range(2)]
    apply_plan(model, make_plan(model, lambda group: range((group.size + 1) // 2)))
    assert [reference() for reference in old] == [None, None]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="mappings are listed in /proc")
@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_model_that_is_cut_leaves_the_dense_file_with_the_same_weights(name, tmp_path):
    dense = tiny_model(name).model
    save_checkpoint(tmp_path / "dense", dense, None, None)
    model, plan = load_model(tmp_path / "dense").model, random_plan(dense)
    assert str(tmp_path / "dense") in Path("/proc/self/maps").read_text()
    apply_plan(model, plan)
    gc.collect()
    assert str(tmp_path / "dense") not in Path("/proc/self/maps").read_text()
    assert same_weights(weights(model), weights(apply_plan(dense, plan)))


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="mappings are listed in /proc")
def test_a_model_that_is_masked_leaves_the_dense_file_before_it_is_written_into(tmp_path):
    dense = tiny_model("llava").model
    save_checkpoint(tmp_path / "dense", dense, None, None)
    model, plan = load_model(tmp_path / "dense").model, random_plan(dense)
    mask_plan(model, plan)
    gc.collect()
    assert str(tmp_path / "dense") not in Path("/proc/self/maps").read_text()
    assert same_weights(weights(model), weights(mask_plan(dense, plan)))


def test_head_counts_on_the_modules_follow_the_cut():
    model = tiny_model("internvl").model
    plan = make_plan(model, lambda group: range(group.size // 2) if group.tower == "vision" else range(group.size))
    attention = apply_plan(model, plan).model.vision_tower.encoder.layer[0].attention
    assert (attention.num_heads, attention.embed_dim, attention.q_proj.out_features) == (2, 16, 16)
    assert attention.q_norm.weight.shape == (16,)


def test_kept_t5_heads_are_recorded_in_dense_numbering_after_two_cuts():
    model = tiny_model("blip2_t5").model

    def keep(heads):
        return lambda group: heads if group.key == "encoder.1.attn" else range(group.size)

    apply_plan(model, make_plan(model, keep([0, 2, 3])))
    apply_plan(model, make_plan(model, keep([1, 2])))
    record = model.config.slimvlm["forwards"]
    assert record == {
        "language_model.encoder.block.1.layer.0.SelfAttention": {"name": "t5_position_bias", "heads": [2, 3]}
    }


def test_a_plan_of_another_model_is_refused_and_nothing_is_cut():
    model = tiny_model("llava").model
    plan = random_plan(model, seed=1)
    before = weights(model)
    with pytest.raises(CheckpointError, match="plan is for family 'clip', this model is 'llava'"):
        apply_plan(model, replace(plan, family="clip"))
    sizes = {**plan.sizes, "language.1.mlp": 999}
    with pytest.raises(CheckpointError, match=r"group language.1.mlp has 40 indices in this model, 999 in the plan"):
        apply_plan(model, replace(plan, sizes=sizes))
    with pytest.raises(CheckpointError, match="do not have the same groups; first difference: language.9.mlp"):
        apply_plan(
            model,
            replace(plan, sizes={**plan.sizes, "language.9.mlp": 3}, keep={**plan.keep, "language.9.mlp": (0,)}),
        )
    with pytest.raises(CheckpointError, match="the plan says 5 parameters remain, cutting this model leaves"):
        apply_plan(model, replace(plan, parameters_after=5))
    assert same_weights(before, model.state_dict())
    assert not hasattr(model.config, "slimvlm")


def test_kv_heads_left_with_different_numbers_of_query_heads_are_refused_before_the_cut():
    model = tiny_model("llava").model
    plan = make_plan(model, lambda group: range(group.size))
    before = weights(model)
    with pytest.raises(ValueError, match=r"language.0.attn: every kept KV head must keep the same number"):
        apply_plan(model, replace(plan, keep={**plan.keep, "language.0.attn": (0, 1, 2)}))
    assert same_weights(before, model.state_dict())


def test_a_slim_class_without_a_record_is_the_stock_model():
    tiny = tiny_model("clip")
    slim = slim_class(type(tiny.model))(tiny.model.config)
    slim.load_state_dict(tiny.model.state_dict())
    assert torch.equal(logits(slim.eval(), tiny.inputs(1)), logits(tiny.model, tiny.inputs(1)))
    assert slim_class(type(slim)) is type(slim)
    assert isinstance(slim, type(tiny.model))


def test_shrinking_by_a_record_of_another_schema_or_model_is_refused():
    model = tiny_model("llava").model
    record = {"schema": 1, "shapes": {"model.nowhere": [1, 1]}, "attributes": {}, "forwards": {}}
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration has no module 'model.nowhere'"):
        shrink(model, record)
    with pytest.raises(ValueError, match="schema 2 is not the 1 this file reads"):
        shrink(model, {**record, "schema": 2})


def test_random_plans_differ_from_layer_to_layer():
    plan = make_plan(tiny_model("llava").model, random_choice(1))
    assert len({len(kept) for key, kept in plan.keep.items() if key.endswith("mlp")}) > 3
