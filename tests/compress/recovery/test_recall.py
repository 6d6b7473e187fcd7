"""Weight recalling: nothing changes until it is trained, it trains factors only, and it merges away without a trace."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from outputs import logits
from plans import random_plan
from recalled import SMALL, literal, make_case, randomise, trainable
from safetensors import safe_open
from tiny_models import EVERY, FACTORIES, tiny_model

from slimvlm.compress.errors import CheckFailedError, CheckpointError, UnsuitableOptionError
from slimvlm.compress.models.checkpoint import Loaded, load_model
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import CompressOptions, LowRank
from slimvlm.compress.recovery import recover
from slimvlm.compress.recovery.adapters.recall import (
    attach,
    find_targets,
    merge,
    recall_layers,
)
from slimvlm.compress.recovery.adapters.slices import Slices
from slimvlm.compress.slicing.apply import apply_plan


@pytest.mark.parametrize("name", EVERY)
def test_attaching_changes_no_output_and_trains_factors_only(tmp_path, name):
    case = make_case(tmp_path, name)
    before = case.outputs()
    adapted = case.attach()
    assert adapted.get_base_model() is case.model
    assert torch.equal(case.outputs(adapted), before)
    layers = recall_layers(case.model)
    assert set(layers) == set(find_targets(case.model, case.plan.attention_unit))
    factors = {f"base_model.model.{path}.{n}" for path, one in layers.items() for n, _ in one.named_parameters()}
    assert set(trainable(adapted)) == {name for name in factors if "lora_" in name}
    for path, one in layers.items():
        lost = case.slices.of(path)
        assert [len(d) for d in (one.lora_rows_A, one.lora_columns_A)] == [
            int(piece is not None) for piece in (lost.rows, lost.columns)
        ]
    assert any(len(one.lora_rows_A) + len(one.lora_columns_A) == 0 for one in layers.values())  # lost nothing


@pytest.mark.parametrize("name", EVERY)
def test_merging_keeps_the_outputs_and_leaves_no_trace(tmp_path, name):
    case = make_case(tmp_path, name)
    kinds, names, config = (
        [type(module) for module in case.model.modules()],
        [(name, weight.shape, weight.dtype) for name, weight in case.model.named_parameters()],
        copy.deepcopy(case.model.config.to_dict()),
    )
    attributes, before = set(vars(case.model)), case.outputs()
    adapted = randomise(case.attach())
    trained = case.outputs(adapted)
    assert (trained - before).abs().max() > 1e-2
    merged = merge(adapted)
    assert merged is case.model
    assert (case.outputs(merged) - trained).abs().max() <= 1e-5
    assert [type(module) for module in merged.modules()] == kinds
    assert [(name, weight.shape, weight.dtype) for name, weight in merged.named_parameters()] == names
    assert merged.config.to_dict() == config
    assert set(vars(merged)) == attributes
    assert all(weight.requires_grad for weight in merged.parameters())
    assert count_parameters(merged) == case.plan.parameters_after
    save_checkpoint(tmp_path / "slim", merged, None, case.plan)
    reloaded = load_model(tmp_path / "slim", attention="eager").model
    assert torch.equal(case.outputs(reloaded), case.outputs(merged))


def uniform(model):
    """A choice of units that plain config fields of the unmodified class can express."""
    pooled = any(path.endswith("head.mlp") for path, _ in model.named_modules())

    def choose(group):
        if not group.part.fields or (pooled and group.tower == "vision"):
            return range(group.size)
        return range(0, group.size, 2) if group.slots else range(group.size // 2)

    return choose


@pytest.mark.parametrize("name", EVERY)
def test_merging_keeps_the_stock_layout(tmp_path, name):
    case = make_case(tmp_path, name, uniform(tiny_model(name).model), "stock")
    save_checkpoint(tmp_path / "cut", case.model, None, case.plan, "stock")
    model = load_model(tmp_path / "cut", attention="eager").model
    assert type(model).__module__.startswith("transformers.models.")
    slices = Slices(tmp_path / "dense", model, case.plan)
    merged = merge(randomise(attach(model, case.plan, slices, SMALL)))
    save_checkpoint(tmp_path / "slim", merged, None, case.plan, "stock")
    reloaded = load_model(tmp_path / "slim", attention="eager").model
    assert type(reloaded) is type(model)
    assert torch.equal(case.outputs(reloaded), case.outputs(merged))
    assert (case.outputs(merged) - case.outputs()).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2_t5", "clip"])
def test_gradients_of_the_reassociated_and_the_literal_form_are_equal(tmp_path, name):
    case = make_case(tmp_path, name)
    options = replace(SMALL, dropout=0.0)
    losses, gradients = [], []
    for form in (lambda model: model, literal):
        one = replace(case, model=copy.deepcopy(case.model).double())
        adapted = form(randomise(one.attach(options), 0.3))
        batch = {k: v.double() if v.is_floating_point() else v for k, v in case.tiny.inputs(2).items()}
        out = adapted(**batch, **({"return_loss": True} if name == "clip" else {}))
        out.loss.backward()
        losses.append(out.loss.detach())
        gradients.append({key: weight.grad for key, weight in trainable(adapted).items()})
        assert all(weight.grad is None for weight in adapted.parameters() if not weight.requires_grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    for key, grad in gradients[0].items():
        assert (grad is None) == (gradients[1][key] is None), key
        if grad is not None:
            torch.testing.assert_close(grad, gradients[1][key], rtol=1e-6, atol=1e-12, msg=key)
    used = [key for key, grad in gradients[0].items() if grad is not None and grad.abs().max() > 0]
    assert any("lora_rows_A" in key for key in used)
    assert any("lora_columns_B" in key for key in used)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    case = make_case(tmp_path)
    found = []
    for checkpointed in (False, True):
        adapted = randomise(replace(case, model=copy.deepcopy(case.model)).attach(replace(SMALL, dropout=0.0)))
        if checkpointed:
            adapted.get_base_model().activation_checkpointing_enable()
        adapted.train()
        adapted(**case.tiny.inputs(2)).loss.backward()
        found.append([weight.grad for weight in trainable(adapted).values() if weight.grad is not None])
    assert len(found[0]) == len(found[1]) > 50
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


def test_a_factor_that_is_not_finite_is_refused_and_nothing_is_replaced(tmp_path):
    case = make_case(tmp_path)
    adapted = randomise(case.attach())
    path = list(recall_layers(case.model))[-1]
    next(iter(recall_layers(case.model)[path].lora_A.values())).weight.data[0, 0] = float("nan")
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    with pytest.raises(CheckFailedError, match=re.escape(path)):
        merge(adapted)
    after = adapted.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)
    assert recall_layers(case.model)


def test_a_merged_weight_that_overflows_its_dtype_is_refused(tmp_path):
    case = make_case(tmp_path, dtype=torch.float16)
    adapted = randomise(case.attach(), 200.0)
    weights = [one.weight.clone() for one in recall_layers(case.model).values()]
    with pytest.raises(CheckFailedError, match=r"not finite in torch\.float16"):
        merge(adapted)
    layers = recall_layers(case.model).values()
    assert all(torch.equal(one.weight, weight) for one, weight in zip(layers, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_get_fp32_factors_and_one_rounding(tmp_path, dtype):
    case = make_case(tmp_path, dtype=dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.tiny.inputs(2).items()}
    before = logits(case.model, batch)
    adapted = case.attach()
    assert torch.equal(logits(adapted, batch), before)
    assert {weight.dtype for weight in trainable(adapted).values()} == {torch.float32}
    randomise(adapted)
    adapted(**batch).loss.backward()
    assert all(w.grad.dtype == torch.float32 and w.grad.isfinite().all() for w in trainable(adapted).values()
               if w.grad is not None)  # fmt: skip
    expected = {
        path: (one.weight.float() + one.get_delta_weight("default")).to(dtype)
        for path, one in recall_layers(case.model).items()
    }
    merged = merge(adapted)
    for path, weight in expected.items():
        assert torch.equal(merged.get_submodule(path).weight, weight)


def test_autocast_stays_near_the_full_precision(tmp_path):
    case = make_case(tmp_path)
    adapted = randomise(case.attach())
    expected = case.outputs(adapted)
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapted(**case.tiny.inputs(2)).loss
        found = case.outputs(adapted)
    loss.backward()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in trainable(adapted).values())


@pytest.mark.parametrize("name", FACTORIES)
def test_adapter_files_of_peft_hold_the_factors_and_load_again(tmp_path, name):
    case = make_case(tmp_path, name)
    other = replace(case, model=copy.deepcopy(case.model))
    adapted = randomise(case.attach())
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as opened:
        stored = set(opened.keys())
    assert len(stored) == len(trainable(adapted))
    assert all(".lora_" in key for key in stored)  # neither slices nor weights
    again = other.attach()
    again.load_adapter(str(tmp_path / "adapter"), "default")
    assert torch.equal(case.outputs(again.eval()), case.outputs(adapted))


def test_the_switches_of_peft_work(tmp_path):
    case = make_case(tmp_path)
    before = case.outputs()
    adapted = randomise(case.attach())
    trained = case.outputs(adapted)
    with adapted.disable_adapter():
        assert torch.equal(case.outputs(adapted), before)
    adapted.merge_adapter()
    torch.testing.assert_close(case.outputs(adapted), trained, atol=1e-5, rtol=0)
    adapted.unmerge_adapter()
    torch.testing.assert_close(case.outputs(adapted), trained, atol=1e-5, rtol=0)
    assert count_parameters(adapted.unload()) == case.plan.parameters_after
    torch.testing.assert_close(case.outputs(), before, atol=1e-5, rtol=0)


def test_ties_survive_the_merge(tmp_path):
    case = make_case(tmp_path, "paligemma")
    head, embedding = case.model.get_output_embeddings(), case.model.get_input_embeddings()
    assert head.weight is embedding.weight
    merged = merge(randomise(case.attach()))
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings == case.model.config.tie_word_embeddings


def test_targets_choose_linears_by_the_end_of_their_path(tmp_path):
    case = make_case(tmp_path)
    adapted = case.attach(replace(SMALL, targets=("q_proj", "mlp.fc2")))
    found = list(recall_layers(case.model))
    assert found
    assert all(path.endswith((".q_proj", ".mlp.fc2")) for path in found)
    merge(adapted)
    with pytest.raises(UnsuitableOptionError, match="'wi_0' matches no prunable linear; they end with down_proj, fc1"):
        case.attach(replace(SMALL, targets=("q_proj", "wi_0")))
    with pytest.raises(UnsuitableOptionError, match="'proj' matches no"):
        case.attach(replace(SMALL, targets=("proj",)))


def test_a_rank_larger_than_a_matrix_is_refused_before_anything_changes(tmp_path):
    case = make_case(tmp_path)
    for options in (LowRank(rank=20), LowRank(rank=2, recall_rank=20)):
        with pytest.raises(UnsuitableOptionError, match=r"rank 20 is larger than model.*which is 16 x 32"):
            case.attach(options)
    assert not recall_layers(case.model)
    assert count_parameters(case.model) == case.plan.parameters_after


def test_a_checkpoint_that_went_away_is_refused_before_anything_changes(tmp_path):
    case = make_case(tmp_path)
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        case.attach()
    assert not recall_layers(case.model)
    assert count_parameters(case.model) == case.plan.parameters_after


def test_a_layer_that_lost_fewer_rows_than_the_recall_rank_recalls_them_all(tmp_path):
    case = make_case(tmp_path, choose=lambda group: range(group.size - (group.kind == "mlp")))
    adapted = case.attach(LowRank(rank=2, recall_rank=8))
    ranks = {len(one.lora_rows_A["default"].weight) for one in recall_layers(case.model).values() if one.lora_rows_A}
    assert ranks == {1}
    assert isinstance(adapted, peft.PeftModel)


def test_without_recall_no_slices_are_needed(tmp_path):
    case = make_case(tmp_path)
    adapted = randomise(attach(case.model, case.plan, None, replace(SMALL, recall=False)))
    assert all("lora_rows" not in name and "lora_columns" not in name for name in trainable(adapted))
    trained = case.outputs(adapted)
    assert (case.outputs(merge(adapted)) - trained).abs().max() <= 1e-5


def test_plain_low_rank_equals_the_layer_of_peft(tmp_path):
    case = make_case(tmp_path)
    stock = copy.deepcopy(case.model)
    ours = attach(case.model, case.plan, None, replace(SMALL, recall=False))
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=find_targets(stock, case.plan.attention_unit))
    theirs = peft.get_peft_model(stock, config)
    for adapted in (ours, theirs):
        randomise(adapted)
    torch.testing.assert_close(case.outputs(ours), case.outputs(theirs), atol=1e-5, rtol=0)


def test_misuse_is_an_error_of_the_caller(tmp_path):
    case = make_case(tmp_path)
    with pytest.raises(ValueError, match="recall needs the slices"):
        attach(case.model, case.plan, None, SMALL)
    case.attach()
    with pytest.raises(ValueError, match="has an adapter already"):
        case.attach()


@pytest.mark.parametrize("unit", ["kv-group", "query-slot"])
def test_random_widths_in_every_layer_merge_exactly(tmp_path, unit):
    tiny = tiny_model("qwen3_vl")
    tiny.model.save_pretrained(tmp_path / "dense")
    plan = random_plan(tiny.model, 11, unit)
    model = apply_plan(tiny.model, plan)
    adapted = attach(model, plan, Slices(tmp_path / "dense", model, plan), LowRank(rank=1, recall_rank=1))
    trained = logits(randomise(adapted), tiny.inputs(2))
    assert (logits(merge(adapted), tiny.inputs(2)) - trained).abs().max() <= 1e-5


def test_a_merge_that_forgets_the_least_of_all_factors_is_refused(tmp_path, monkeypatch):
    case = make_case(tmp_path)
    adapted, least = randomise(case.attach(), scale=0.01), "model.vision_tower.encoder.layers.1.self_attn.k_proj"
    loaded = Loaded(case.model, None, find_family(case.model.config), "digest", tmp_path)

    def forgetful(adapted):
        factors = recall_layers(case.model)[least].named_parameters()
        for factor in (factor for name, factor in factors if "_B." in name):
            factor.data.zero_()
        return merge(adapted)

    monkeypatch.setattr(recover, "merge", forgetful)
    with pytest.raises(CheckFailedError, match="differs from the trained one"):
        recover._merge(loaded, adapted, case.tiny.inputs(2))


def test_two_gpus_do_not_make_new_factors_warn(monkeypatch, recwarn):
    tiny = tiny_model("llava")
    plan = random_plan(tiny.model)
    loaded = Loaded(tiny.model, None, find_family(tiny.model.config), "digest", Path())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = CompressOptions(model="dense", out=Path("out"), data=Path("data"), recall=False)
    assert recover._prepare(options, plan, loaded) is not None
    assert not [warning for warning in recwarn if "fork_rng" in str(warning.message)]
