"""Text models, by the model type of their config: where its module has the blocks, and what is in them.

A row holds in every family whose text model this is (joins.py).
"""

from __future__ import annotations

from dataclasses import replace

from slimvlm.compress.models.families.parts import ENCODER, GATED_MLP, GQA, GQA_HIDDEN, HEADS, PLAIN_MLP, SEPARATE
from slimvlm.compress.models.families.rows import Attention, Mlp, Text, Tower


def _language(blocks: str, *parts: Attention | Mlp) -> Tower:
    return Tower("language", "language", "text_config", blocks, parts)


def _t5_attention(module: str, key: str) -> Attention:
    return Attention(
        module,
        ("q", "k", "v"),
        "o",
        key=key,
        head_dim="key_value_proj_dim",
        patch=(("n_heads", "heads"), ("inner_dim", "width")),
        forward="t5_position_bias",  # the layers share one bias over all heads: no stock head cut
    )


def _t5_mlp(layer: int) -> Mlp:
    inner = f"layer.{layer}.DenseReluDense"
    return Mlp((f"{inner}.wi_0", f"{inner}.wi_1"), f"{inner}.wo", stock="d_ff")


LLAMA = _language("layers", GQA, GATED_MLP)
QWEN2_VL = _language("layers", GQA_HIDDEN, GATED_MLP)
OPT = _language(
    "decoder.layers", Attention("self_attn", SEPARATE, "out_proj", patch=HEADS), Mlp(("fc1",), "fc2", stock="ffn_dim")
)
T5_BIAS = ("layer.0.SelfAttention", "relative_attention_bias", "has_relative_attention_bias")
T5_ENCODER = Tower(
    "encoder",
    "language",
    "text_config",
    "encoder.block",
    (_t5_attention("layer.0.SelfAttention", "attn"), _t5_mlp(1)),
    first=T5_BIAS,
)
T5_DECODER = Tower(
    "decoder",
    "language",
    "text_config",
    "decoder.block",
    (
        _t5_attention("layer.0.SelfAttention", "attn"),
        _t5_attention("layer.1.EncDecAttention", "cross_attn"),
        _t5_mlp(2),
    ),
    depth=("num_decoder_layers", "decoder_layers"),  # the second sizes the cache, else as long as the encoder
    first=T5_BIAS,
)
CLIP_TEXT = _language("encoder.layers", ENCODER, PLAIN_MLP)

TEXTS: dict[str, Text] = {
    "llama": Text((LLAMA,)),
    "mistral": Text((LLAMA,)),
    "qwen2": Text((LLAMA,)),
    "gemma": Text((LLAMA,)),
    "cohere2": Text((LLAMA,)),
    "gemma3_text": Text((LLAMA,)),
    "hyperclovax": Text((LLAMA,)),
    "paddleocr_vl_text": Text((LLAMA,)),
    "exaone4": Text((LLAMA,)),
    "qwen3": Text((LLAMA,)),
    "cosmos3_edge_text": Text((_language("layers", GQA, PLAIN_MLP),)),
    "qwen2_5_omni_text": Text((QWEN2_VL,)),
    "granite_docling_text": Text((LLAMA,)),
    "granite4_vision_text": Text((LLAMA,)),
    "hunyuan_vl_text": Text((LLAMA,)),
    "cohere_compass_text": Text((LLAMA,)),
    "opt": Text((OPT,)),
    "t5": Text((T5_ENCODER, T5_DECODER), "encoder-decoder", base=""),
    "qwen2_vl_text": Text((QWEN2_VL,)),
    "qwen2_5_vl_text": Text((QWEN2_VL,)),
    "qwen3_vl_text": Text((replace(LLAMA, deepstack="vision_config.deepstack_visual_indexes"),)),
    "clip_text_model": Text((CLIP_TEXT,)),
    "siglip_text_model": Text((CLIP_TEXT,)),
}
