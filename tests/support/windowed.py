"""Tiny models whose language model attends through windows or in chunks."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
import transformers as tf
from exports import SIZES, tiny_samples
from plans import keep_blocks, random_plan
from tiny.joins import JOINS
from tiny_models import TEXT, add_noise, tiny_model
from tiny_processors import tiny_processor

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.models.families import find_family
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.export.job import ExportResult, export_model
from slimvlm.export.options import ExportOptions

WINDOW = 28  # the longest of three tiny prompts has 22 to 26 tokens
THREE = {**TEXT, "num_hidden_layers": 3}
HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8}
SOME_ALL = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
FROM_THE_SECOND = {"use_sliding_window": True, "max_window_layers": 1}
SLIDING = {"sliding_window": WINDOW}
# A family, and the language model that it gets: class of its config, fields.
WINDOWED = {
    "llava, mistral": ("llava", tf.MistralConfig, SLIDING),
    "llava, cohere2": ("llava", tf.Cohere2Config, {**SLIDING, **SOME_ALL}),
    "gemma3": ("gemma3", tf.Gemma3TextConfig, {**SLIDING, **HEADS, **SOME_ALL}),
    "paligemma, gemma2": ("paligemma", tf.Gemma2Config, {**SLIDING, **HEADS, **SOME_ALL}),
    "qwen2_vl": ("qwen2_vl", None, {**SLIDING, **FROM_THE_SECOND}),
    "qwen2_5_vl": ("qwen2_5_vl", None, {**SLIDING, **FROM_THE_SECOND}),
}
TOWERS = {"gemma3": ("siglip_vision_model", "gemma3_text")}  # of families that have no other tiny model
SMALL = 6
# Language models of transformers alone, of three layers, with windows of SMALL tokens.
TEXTS = {
    "llama": (tf.LlamaConfig, {}),
    "mistral": (tf.MistralConfig, {}),
    "ministral": (tf.MinistralConfig, {"head_dim": 8}),
    "ministral3": (tf.Ministral3Config, {"head_dim": 8}),
    "qwen2": (tf.Qwen2Config, FROM_THE_SECOND),
    "qwen3": (tf.Qwen3Config, {**FROM_THE_SECOND, "head_dim": 8}),
    "phi3": (tf.Phi3Config, {}),
    "starcoder2": (tf.Starcoder2Config, {}),
    "gemma2": (tf.Gemma2Config, HEADS),
    "gemma3": (tf.Gemma3TextConfig, {**HEADS, **SOME_ALL}),
    "cohere2": (tf.Cohere2Config, SOME_ALL),
    "exaone4": (tf.Exaone4Config, {**SOME_ALL, "head_dim": 8}),
    "olmo3": (tf.Olmo3Config, SOME_ALL),
    "smollm3": (tf.SmolLM3Config, {**SOME_ALL, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]}),
    "gpt_oss": (tf.GptOssConfig, {**SOME_ALL, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "llama4": (
        tf.Llama4TextConfig,
        {"attention_chunk_size": SMALL, "head_dim": 8, "no_rope_layers": [1, 1, 0], "interleave_moe_layer_step": 4},
    ),
}


def windowed_text(kind: str):
    """A tiny language model of TEXTS, without a head."""
    make, fields = TEXTS[kind]
    window = {} if kind in ("llama", "llama4") else {"sliding_window": SMALL}
    torch.manual_seed(0)
    model = tf.AutoModel.from_config(make(**{**TEXT, "num_hidden_layers": 3}, **fields, **window)).eval()
    add_noise(model)
    return model


def whole_model(kind: str):
    """A tiny model of WINDOWED."""
    family, make, fields = WINDOWED[kind]
    built = JOINS[family](*TOWERS[family])[0] if family in TOWERS else tiny_model(family).model
    config = copy.deepcopy(built.config)
    if make is None:
        make, fields = type(config.text_config), {"rope_parameters": config.text_config.rope_parameters, **fields}
    config.text_config = make(**THREE, **fields)
    torch.manual_seed(0)
    model = type(built)(config).eval()
    add_noise(model)
    return model


def windowed_model(kind: str):
    """The same, cut: other widths in every layer, and the second block gone; with its collator."""
    model = whole_model(kind)
    apply_plan(model, random_plan(model, 1))
    apply_plan(model, keep_blocks(model, lambda group: [1] if group.tower == "language" else []))
    return model, Collator(tiny_processor(WINDOWED[kind][0]), find_family(model.config), model.config)


def export_windowed(model, collator, out: Path, **options) -> ExportResult:
    """By the fast exporter, with few samples."""
    how = {"exporter": "torchscript", "samples": 2, "max_new_tokens": 2, **options}
    size = SIZES.get(collator.family.export.vision)
    chosen = ExportOptions(image_size=size, **how).checked()
    return export_model(model, collator, out, chosen, lambda *_: None, {"family": collator.family.name})


def long_samples(collator, tokens: int, count: int = 3) -> list[Sample]:
    """Questions of different lengths; the prompt of the longest has so many tokens, if it has no more by itself."""
    samples = tiny_samples(count, SIZES.get(collator.family.export.vision, (16, 16)))
    more = "red " * max(0, tokens - collator.prompts(samples)["input_ids"].shape[1])
    return [replace(one, turns=(replace(one.turns[0], prompt=more + one.turns[0].prompt),)) for one in samples]
