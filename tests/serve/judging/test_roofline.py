"""Work counted from shapes is the work torch does, for every family, dense and cut; bytes and ceilings follow."""

from dataclasses import replace

import pytest
import torch
from plans import random_plan
from profiles import DEVICE, example_run
from tiny_models import FACTORIES, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.serve.judging.roofline import (
    CACHE,
    EMBEDDINGS,
    HEAD,
    LANGUAGE,
    VISION,
    Sizes,
    compute_seconds,
    count_costs,
    ideal_seconds,
    kv_bytes_per_token,
    memory_seconds,
    rate_run,
)
from slimvlm.serve.judging.shapes import checkpoint_shapes, model_shapes

BATCH = 2


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def model_of(name: str, is_cut: bool):
    tiny = tiny_model(name)
    model = tiny.model.requires_grad_(False)
    if is_cut:
        apply_plan(model, random_plan(model, seed=3))
    inputs = tiny.inputs(BATCH)
    inputs.pop("labels", None)
    return model, inputs


def sizes_of(inputs: dict[str, torch.Tensor], new_tokens: int = 2) -> Sizes:
    prompt = inputs["input_ids"].shape[1]
    return Sizes(BATCH, tuple(inputs["pixel_values"].shape), prompt, new_tokens, first_logits=prompt)


def costs_of(model, sizes: Sizes, dtype: str = "fp32"):
    return count_costs(model_shapes(model, find_family(model.config)), sizes, dtype)


@pytest.mark.parametrize("is_cut", [False, True], ids=["dense", "cut"])
@pytest.mark.parametrize("name", FACTORIES)
def test_images_and_prompt_take_the_operations_torch_counts(name: str, is_cut: bool) -> None:
    model, inputs = model_of(name, is_cut)
    kind = find_family(model.config).kind
    if kind == "encoder-decoder":
        inputs["decoder_input_ids"] = torch.zeros(BATCH, 1, dtype=torch.long)
    costs = costs_of(model, sizes_of(inputs))
    counted = flops_of(lambda: model(**inputs))
    if kind == "dual-encoder":  # the forward also compares every image with every text
        counted -= 2 * BATCH * BATCH * model(**inputs).text_embeds.shape[-1]
        assert costs["vision"].total_flops + costs["text"].total_flops == counted
    else:
        assert costs["ttft"].total_flops == costs["vision"].total_flops + costs["prefill"].total_flops == counted


LANGUAGE_MODELS = {"llava": "model.language_model", "smolvlm": "model.text_model", "qwen2_5_vl": "model.language_model"}


@pytest.mark.parametrize("is_cut", [False, True], ids=["dense", "cut"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_later_token_takes_the_operations_torch_counts(name: str, is_cut: bool) -> None:
    model, inputs = model_of(name, is_cut)
    text, prompt = model.get_submodule(LANGUAGE_MODELS[name]), inputs["input_ids"].shape[1]
    cache = text(inputs_embeds=torch.randn(BATCH, prompt, 32), use_cache=True).past_key_values
    where = torch.full((BATCH, 1), prompt)
    where = where.expand(3, BATCH, 1) if "qwen" in name else where

    def step() -> None:
        step = text(inputs_embeds=torch.randn(BATCH, 1, 32), past_key_values=cache, position_ids=where)
        model.lm_head(step.last_hidden_state)

    assert costs_of(model, sizes_of(inputs))["tpot"].total_flops == flops_of(step)


def test_a_later_token_of_an_encoder_decoder_takes_the_operations_torch_counts() -> None:
    model, inputs = model_of("blip2_t5", True)
    encoded = torch.randn(BATCH, inputs["input_ids"].shape[1], 32)
    token = torch.zeros(BATCH, 1, dtype=torch.long)
    given = {"encoder_outputs": (encoded,), "decoder_input_ids": token, "use_cache": True}
    cache = model.language_model(**given).past_key_values
    counted = flops_of(lambda: model.language_model(**given, past_key_values=cache))
    assert costs_of(model, sizes_of(inputs))["tpot"].total_flops == counted


def test_many_tokens_cost_the_mean_of_growing_contexts() -> None:
    model, inputs = model_of("llava", False)
    costs = costs_of(model, sizes_of(inputs, new_tokens=9))
    steps = []
    for before in range(8):  # the work of the step after `before` steps
        sizes = sizes_of(inputs)
        steps.append(costs_of(model, replace(sizes, prompt_tokens=sizes.prompt_tokens + before))["tpot"])
    assert costs["tpot"].total_flops == pytest.approx(sum(step.total_flops for step in steps) / 8)
    assert costs["tpot"].total_bytes == pytest.approx(sum(step.total_bytes for step in steps) / 8)
    whole = costs["ttft"].total_flops + 8 * costs["tpot"].total_flops
    assert costs["end_to_end"].total_flops == pytest.approx(whole)


def test_a_step_moves_every_weight_of_the_language_model_once_and_the_cache() -> None:
    model, inputs = model_of("llava", False)
    sizes = sizes_of(inputs)
    costs = costs_of(model, sizes)
    text = model.model.language_model
    weights = sum(parameter.numel() for layer in text.layers for parameter in layer.parameters())
    assert costs["tpot"].bytes[LANGUAGE] == 4 * (weights + text.norm.weight.numel())
    assert costs["tpot"].bytes[HEAD] == 4 * model.lm_head.weight.numel()
    assert costs["tpot"].bytes[EMBEDDINGS] == 4 * BATCH * 32  # one row each
    per_token = kv_bytes_per_token(model_shapes(model, find_family(model.config)), "fp32")
    assert per_token == 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, D, bytes
    assert costs["tpot"].bytes[CACHE] == BATCH * per_token * (sizes.prompt_tokens + 1)
    assert VISION not in costs["tpot"].bytes
    assert costs["tpot"].matmuls == 2 * (7 + 2) + 1  # layers times linears and attention, and the head
    vision = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    projector = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    assert costs["vision"].total_bytes == 4 * (vision + projector)


@pytest.mark.parametrize(("dtype", "weight", "value"), [("fp16", 2, 2), ("bf16", 2, 2), ("int8", 1, 4)])
def test_bytes_follow_the_dtype_of_weights_and_cache(dtype: str, weight: int, value: int) -> None:
    model, inputs = model_of("llava", False)
    full, narrow = (costs_of(model, sizes_of(inputs), name)["tpot"] for name in ("fp32", dtype))
    assert narrow.bytes[LANGUAGE] == full.bytes[LANGUAGE] * weight / 4
    assert narrow.bytes[CACHE] == full.bytes[CACHE] * value / 4
    assert narrow.flops == full.flops


def test_windows_leave_out_what_they_do_not_compare() -> None:
    model, inputs = model_of("qwen2_5_vl", False)  # 4 x 4 patches in windows of 4 x 4: one window
    shapes, sizes = model_shapes(model, find_family(model.config)), sizes_of(inputs)
    small = replace(shapes, attended=tuple(replace(one, window=one.window and 4) for one in shapes.attended))
    whole, part = (count_costs(one, sizes, "fp32")["vision"].total_flops for one in (shapes, small))
    assert whole - part == 4 * 32 * BATCH * 16 * (16 - 4)  # one of the two layers has windows


def test_shapes_are_read_from_a_checkpoint_without_its_weights(tmp_path) -> None:
    model, _ = model_of("llava", True)
    save_checkpoint(tmp_path / "cut", model, None, None)
    (tmp_path / "cut" / "model.safetensors").unlink()
    shapes = checkpoint_shapes(tmp_path / "cut")
    assert shapes == model_shapes(model, find_family(model.config))
    assert shapes.parameters == count_parameters(model)


def test_text_alone_has_no_vision_and_one_token_no_later_one() -> None:
    model, inputs = model_of("llava", False)
    costs = costs_of(model, replace(sizes_of(inputs), pixels=None, new_tokens=1))
    assert set(costs) == {"prefill", "ttft", "end_to_end"}
    assert costs["ttft"] == costs["prefill"] == costs["end_to_end"]


def test_unknown_dtypes_and_shapes_are_refused() -> None:
    model, inputs = model_of("llava", False)
    with pytest.raises(ValueError, match="dtype is 'int5'"):
        costs_of(model, sizes_of(inputs), "int5")
    with pytest.raises(ValueError, match=r"pixels have shape \(1, 2, 3\)"):
        costs_of(model, replace(sizes_of(inputs), pixels=(1, 2, 3)))


def test_shares_are_of_the_measured_rates_for_that_many_bytes() -> None:
    model, inputs = model_of("llava", False)
    costs = costs_of(model, sizes_of(inputs))
    cost = costs["tpot"]
    assert cost.total_bytes < 2**20  # so small that the faster of the device's copies counts
    run = replace(example_run({"tpot": 1e-3, "ttft": 1e-2}, 1), flops={}, bytes={}, mfu=None, mbu=None)
    rated = rate_run(run, costs, DEVICE, "fp32")
    assert set(rated.flops) == {"tpot", "ttft"}
    assert set(rated.mfu) == set(rated.mbu) == {"tpot"}  # a sum of passes has no one working set
    assert rated.bytes["tpot"] == cost.total_bytes
    assert rated.mbu["tpot"] == pytest.approx(cost.total_bytes / 5e10 / 1e-3)
    assert rated.mfu["tpot"] == pytest.approx(cost.total_flops / 1e11 / 1e-3)
    assert rate_run(run, costs, DEVICE, "int8").mfu is None
    large = replace(cost, bytes={LANGUAGE: 2.0**30})
    assert memory_seconds(large, DEVICE) == pytest.approx(2**30 / 1e10)
    assert ideal_seconds(large, DEVICE, "fp32") == memory_seconds(large, DEVICE)
    assert compute_seconds(large, DEVICE, "int8") is None


@pytest.mark.parametrize("name", ["glm4v", "lfm2_vl"])
def test_patches_without_a_convolution_and_patches_joined_by_one_are_understood(name):
    model = tiny_model(name).model
    shapes = model_shapes(model, find_family(model.config))
    assert (shapes.patch, shapes.merged) == ((4, 4), 4)
