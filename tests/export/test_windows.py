"""Language models that attend through windows or in chunks: the graphs mask as they do, at any length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from exports import quality_of
from tiny_models import TEXT
from tiny_processors import tiny_processor
from torch import nn
from transformers import DynamicCache
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask
from windowed import (
    SMALL,
    TEXTS,
    WINDOW,
    WINDOWED,
    export_windowed,
    long_samples,
    whole_model,
    windowed_model,
    windowed_text,
)

from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.models.families import Export
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.checks.answers import retell, torch_answers
from slimvlm.export.graphs.decoder import Decoder
from slimvlm.export.graphs.masks import attention_masks
from slimvlm.export.graphs.windows import Reach, reaches
from slimvlm.export.running.exported import Exported

STEPS = SMALL + 2  # tokens one by one: beyond the window also where the prompt is not


ONE_OF_TWO = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
ALL = Reach()
SAID = {
    "llama": (tf.LlamaConfig, {}, ALL),
    "mistral": (tf.MistralConfig, {"sliding_window": 8}, Reach("sliding_attention", 8)),
    "mistral, without": (tf.MistralConfig, {"sliding_window": None}, ALL),
    "mistral, a switch it does not read": (
        *(tf.MistralConfig, {"sliding_window": 8, "use_sliding_window": False}),
        Reach("sliding_attention", 8),
    ),
    "phi3": (tf.Phi3Config, {"sliding_window": 8}, Reach("sliding_attention", 8)),
    "qwen2, switched off": (tf.Qwen2Config, {"sliding_window": 8}, ALL),
    "qwen2, from its second layer": (tf.Qwen2Config, ONE_OF_TWO, ALL, Reach("sliding_attention", 8)),
    "qwen2, behind its last layer": (tf.Qwen2Config, {**ONE_OF_TWO, "max_window_layers": 2}, ALL),
    "qwen3_moe, switched off": (tf.Qwen3MoeConfig, {"sliding_window": 8, "use_sliding_window": False}, ALL),
    "gemma2": (tf.Gemma2Config, {"sliding_window": 8, "head_dim": 8}, Reach("sliding_attention", 8), ALL),
    "gemma3, not used": (tf.Gemma3TextConfig, {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, ALL),
    "llama4": (tf.Llama4TextConfig, {"attention_chunk_size": 8}, Reach("chunked_attention", 8)),
}


@pytest.mark.parametrize("kind", SAID)
def test_a_window_is_what_the_configs_own_class_says(kind):
    make, fields, *expected = SAID[kind]
    assert reaches(make(**TEXT, **fields)) == tuple(expected)


@torch.inference_mode()
@pytest.mark.parametrize("kind", TEXTS)
def test_the_decoder_sees_what_the_model_sees_by_its_own_masks_and_cache(kind):
    """At prompts below, at and two times beyond the window, of two lengths in a batch, and at every step after."""
    text, head = windowed_text(kind), nn.Linear(32, 32)
    for count in (SMALL - 2, SMALL, SMALL + 1, 2 * SMALL + 3):
        found = told(Decoder(text, head, Export()).eval(), count)
        wanted = told(own(text, head), count)
        assert found.shape == (2, count - 2 + STEPS, 32)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("kind", sorted(set(TEXTS) - {"llama"}))
def test_a_window_changes_what_is_beyond_it_alone(kind):
    """Else the test above would show nothing."""
    text, head = windowed_text(kind), nn.Linear(32, 32)
    whole, windowed = Decoder(text, head, Export()).eval(), Decoder(text, head, Export()).eval()
    whole.reaches = tuple(replace(reach, size=reach.size and 1000) for reach in windowed.reaches)
    apart = (told(whole, 2 * SMALL) - told(windowed, 2 * SMALL)).abs()
    assert apart[:, : SMALL - 2].max() < 1e-5  # the first SMALL tokens, without two of padding
    assert apart[:, -STEPS:].max() > 1e-2


def told(step, count):
    """What `step` says of two rows, the first padded by two tokens: a prompt of `count`, then token by token."""
    embeds = torch.randn(2, count + STEPS, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, count, dtype=torch.long)
    mask[0, :2] = 0
    said, *past = step(embeds[:, :count], mask, (mask.cumsum(1) - 1).clamp(min=0))
    parts = [said[:, 2:]]
    for place in range(count, count + STEPS):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        said, *past = step(embeds[:, place : place + 1], mask, mask.sum(1, keepdim=True) - 1, *past)
        parts.append(said)
    return torch.cat(parts, dim=1)


def own(text, head):
    """A step of the model as it is, with a cache of its own, which drops what is out of a window."""
    cache = DynamicCache(config=text.config)

    def step(embeds, mask, positions):
        hidden = text(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache)
        return (head(hidden.last_hidden_state),)

    return step


WAYS = {"qwen2_vl": {"formats": ("onnx", "torchscript")}, "llava, mistral": {"variants": ("fp32", "int8", "q4")}}
LIKE_TORCH = {"onnx": 1e-9, "torchscript": 1e-9, "onnx:int8": 0.01, "onnx:q4": 0.2}  # KL, nats a token


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A function: kind -> a cut model with windows, its collator and its export, made at first use."""
    done = {}

    def get(kind):
        if kind not in done:
            model, collator = windowed_model(kind)
            out = tmp_path_factory.mktemp("windows") / "export"
            done[kind] = model, collator, export_windowed(model, collator, out, **WAYS.get(kind, {}))
        return done[kind]

    return get


@pytest.mark.parametrize("kind", sorted(set(WINDOWED) - {"qwen2_5_vl"}))  # the language model of qwen2_vl
def test_whole_answers_of_an_export_are_torchs_below_at_and_two_times_beyond_the_window(windowed, kind):
    model, collator, result = windowed(kind)
    exported, prompting = Exported.open(result.out), result.manifest.generation
    assert set(result.manifest.graphs) <= set(LIKE_TORCH)
    for backend in result.manifest.graphs:
        runner = exported.runner(exported.named(backend), "cpu")
        for tokens, rows in ((0, 3), (WINDOW, 1), (WINDOW + 1, 3), (2 * WINDOW + 3, 1), (2 * WINDOW + 3, 3)):
            given = collator.prompts(long_samples(collator, tokens)[-rows:])
            assert given["input_ids"].shape[1] == tokens or not tokens
            arrays = {name: tensor.numpy() for name, tensor in given.items()}
            answers = torch_answers(model, collator, arrays, prompting, 4)
            retold = retell(runner, prompting, answers, "answers")
            assert float(np.concatenate(retold.divergences).mean()) < LIKE_TORCH[backend]
            if backend in ("onnx", "torchscript"):
                assert retold.difference.max_relative < 1e-5  # of every logit on torch's way, so no tie decides


@pytest.mark.parametrize("kind", sorted(set(WINDOWED) - {"qwen2_5_vl"}))
def test_every_check_of_an_export_has_a_prompt_beyond_the_window(windowed, kind):
    checks = windowed(kind)[2].manifest.checks
    assert checks and all(check["window"] == WINDOW and check["long_prompt"] > 200 for check in checks)


def test_a_checkpoint_whose_language_model_has_only_plain_attention_is_exported(tmp_path):
    """Gemma 2 caps what attention multiplies, which torch's fused attention cannot; the tower beside it can."""
    save_checkpoint(tmp_path / "model", whole_model("paligemma, gemma2"), tiny_processor("paligemma"), None)
    options = ExportOptions(exporter="torchscript", samples=1, max_new_tokens=1)
    [check] = export_checkpoint(tmp_path / "model", tmp_path / "export", options).manifest.checks
    assert check["ok"]


@torch.inference_mode()
def test_the_tokens_of_an_image_see_each_other_within_their_window_and_other_images_only_backwards(windowed):
    """By the masks of Gemma 3 itself, on two images one after the other, of which one is longer than the window."""
    text = windowed("gemma3")[0].model.language_model
    image = torch.tensor([[False, True, True, False, *[True] * (WINDOW + 4), False, False]])
    mask, embeds = torch.ones(1, image.shape[1], dtype=torch.long), torch.zeros(1, image.shape[1], 32)
    blocks = get_block_sequence_ids_for_mask(image.long())
    wanted = create_masks_for_vision_model(text.config, embeds, mask, None, None, blocks)
    found = attention_masks(mask, embeds, reaches(text.config), image=image)
    for kind, allowed in wanted.items():
        assert torch.equal(found[kind] == 0, allowed)
    assert (found["full_attention"][0, 0, 1, :5] == 0).tolist() == [True, True, True, False, False]


def test_an_image_may_stand_in_the_place_of_another_token_than_its_features(windowed):
    """As in Gemma 3: the example puts together the processor's prompt."""
    prompt = windowed("gemma3")[2].manifest.run["prompt"]
    assert prompt["placeholder"] != prompt["image_token"]
    assert prompt["image_ids"] == [prompt["placeholder"], *[prompt["image_token"]] * 4, 93]


@pytest.mark.parametrize("kind", ("llava, mistral", "qwen2_vl"))
def test_long_questions_are_scored_as_in_torch(windowed, kind):
    model, collator, result = windowed(kind)
    samples = long_samples(collator, 3 * WINDOW)
    wanted = evaluate(model, collator, samples)
    found = quality_of(result.out, WINDOWED[kind][0], "onnx", samples)
    assert found.scores == pytest.approx(wanted.scores, rel=1e-4)
    assert [row.loss for row in found.rows] == pytest.approx([row.loss for row in wanted.rows], rel=1e-4)
