"""A tiny config of any model type, from the type's own config class: what its fields are called says what they size.

The classes build what follows from the sizes (layer types, patterns) by themselves, so lists with an entry per layer
are left out. What cannot be told from a name stands in facts.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

Fields = dict[str, Any]
IMAGE_TOKEN, VOCABULARY = 90, 96
DEPTH, HEADS, KV_HEADS, HEAD_DIM, WIDTH, CHANNELS = 2, 4, 2, 8, 32, 48
# The first pattern that a field's whole name matches sizes it.
SIZES: tuple[tuple[str, int], ...] = (
    (
        r"num_hidden_layers|depth|num_layers|n_layers|(en|de)coder_layers|num_decoder_layers|layers|resampler_depth",
        DEPTH,
    ),
    (r"(num_|(en|de)coder_|num_sliding_|swa_num_|index_)?(attention_|n_)?heads|resampler_(n_)?heads", HEADS),
    (r"(num|swa_num)_key_value_heads", KV_HEADS),
    (r"(swa_|v_|index_|resampler_|resampler_dim_)?head(_dim)?|d_kv|linear_(key_|value_)?head_dim", HEAD_DIM),
    (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"qk_head_dim|query_pre_attn_scalar", HEAD_DIM),
    (r"linear_num_(key_|value_)?heads", KV_HEADS),
    (r"(q|kv)_lora_rank|(hc|laurel)_(lowrank|rank)", 16),
    (r"hidden_size_per_layer_input", 8),
    (r".*intermediate_size(_mlp)?|(en|de)coder_ffn_dim|ffn_dim|d_ff|mlp_dim|projection_hidden_(dim|size)", CHANNELS),
    (r"projector_hidden_size|merged_hidden_size|share_expert_dim|moe_hidden_size", CHANNELS),
    (
        r".*(hidden_size|embed_dim|d_model|projection_dim|output_dim|proj_dim|out_hidden_size)|projector_input_dim",
        WIDTH,
    ),
    (r"num_experts|n(um)?_(routed|local)_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
    (r"n_group|topk_group|n_shared_experts|moe_num_shared_experts|first_k_dense_replace", 1),
    (r"num_query_tokens|latent_query_num|resampler_n(um)?_latents", 4),
    (r"(padded_|unpadded_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"image_size|resolution|max_img_size", 16),
    (r"patch_size", 4),
    (r"num_position_embeddings|num_patches", 16),
    (r"window_size", 16),
    (r"max_(2d_)?position_embeddings", 256),
    (r"(attention_chunk|sliding_window)(_size)?", 128),
    (r"num_nextn_predict_layers", 0),
    (r"num_groups", 4),
    (r"(base|latent|output|post_conv_.*)_channels", 32),
)
TOKEN = re.compile(r".*token_(id|index)|im_(start|end|newline)_id|image_patch_id")
IMAGE = ("image_token_id", "image_token_index", "image_patch_id")
LISTS = {"image_size": [16, 16], "patch_size": [4, 4]}
PINPOINTS = [[16, 16], [16, 32], [32, 16]]
FIXED = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "forced_eos": 2, "sep": 2, "eod": 2}


def tiny_config(model_type: str, facts: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of `model_type` with every size small; `facts` (nested, by field) win."""
    kind = CONFIG_MAPPING[model_type]
    tokens = iter(range(89, 40, -1))
    return kind(**_merged(_shrunk(kind().to_dict(), tokens), facts))


def _shrunk(fields: Mapping[str, Any], tokens: Iterator[int]) -> Fields:
    found: Fields = {}
    depth = next((v for k, v in fields.items() if k in ("num_hidden_layers", "depth") and isinstance(v, int)), None)
    for name, value in fields.items():
        if name == "per_layer_config":
            continue
        if isinstance(value, dict) and (name.endswith("_config") or name in ("encoder", "decoder")):
            found[name] = _shrunk(value, tokens)
        elif name in IMAGE:
            found[name] = IMAGE_TOKEN
        elif name in LISTS and isinstance(value, list) and len(value) == len(LISTS[name]):
            found[name] = LISTS[name]
        elif name == "image_grid_pinpoints":
            found[name] = PINPOINTS
        elif isinstance(value, list | tuple) and len(value) == depth:
            continue
        elif isinstance(value, int) and not isinstance(value, bool):
            found[name] = _number(name, value, tokens, fields)
        elif isinstance(value, dict) and "rope" in name:
            found[name] = _rope(value)
        elif name == "model_type" or (
            value is not None and name not in ("transformers_version", "architectures", "layer_types")
        ):
            found[name] = value
    return found


def _number(name: str, value: int, tokens: Iterator[int], fields: Mapping[str, Any]) -> int:
    if TOKEN.fullmatch(name):
        return FIXED.get(name.rpartition("_token")[0], value if value < 3 else next(tokens))
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)
    if name == "num_key_value_heads" and value == fields.get("num_attention_heads"):
        return HEADS
    return size


def _rope(value: Fields) -> Fields:
    """Sections of positions, where the model has such, are parts of half a head."""
    found: Fields = {name: _rope(inner) if isinstance(inner, dict) else inner for name, inner in value.items()}
    if "rope_theta" in found:
        half = int(HEAD_DIM * (found.get("partial_rotary_factor") or 1)) // 2
        side = half // 3
        found["mrope_section"] = [half - 2 * side, side, side]
    return found


def _merged(fields: Fields, facts: Mapping[str, Any]) -> Fields:
    """`facts` over `fields`; None takes a field out."""
    found = dict(fields)
    for name, value in facts.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            value = _merged(found[name], value)
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return found
