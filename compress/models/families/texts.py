"""Text models, by the model type of their config: where its module has the blocks, and what is in them.

A row holds in every family whose text model this is (joins.py).
"""

from __future__ import annotations

from dataclasses import replace

from slimvlm.compress.models.families.mixed import MIXED_TEXTS
from slimvlm.compress.models.families.parts import ENCODER, GATED_MLP, GQA, GQA_HIDDEN, HEADS, PLAIN_MLP, SEPARATE
from slimvlm.compress.models.families.rows import Attention, Mlp, Text, Tower


def _decoder(attention: Attention, mlp: Mlp, blocks: str = "layers", deepstack: str | None = None) -> Text:
    return Text((Tower("language", "language", "text_config", blocks, (attention, mlp), deepstack=deepstack),))


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


NORMS = ("q_norm", "k_norm")
UP_MLP = Mlp(("mlp.up_proj",), "mlp.down_proj", stock="intermediate_size")
CONV_MLP = Mlp(("mlp.c_fc",), "mlp.c_proj", stock="intermediate_size")
OPT_ATTENTION = Attention("self_attn", SEPARATE, "out_proj", patch=HEADS)
OPT_MLP = Mlp(("fc1",), "fc2", stock="ffn_dim")

LLAMA = _decoder(GQA, GATED_MLP)
UNGATED = _decoder(GQA, UP_MLP)
COHERE = _decoder(replace(GQA, norms=NORMS), GATED_MLP)  # its norms, if it has them, have a row per head
# The epsilon of a norm over all heads is another one when they are fewer: no stock head cut.
OLMO2 = _decoder(replace(GQA, norms=NORMS, stock=()), GATED_MLP)
QWEN2_VL = _decoder(GQA_HIDDEN, GATED_MLP)
CLIP_TEXT = _decoder(ENCODER, PLAIN_MLP, "encoder.layers")
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

TEXTS: dict[str, Text] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "cohere": COHERE,
    "cohere2": LLAMA,
    "olmo": LLAMA,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "ernie4_5": LLAMA,
    "exaone4": LLAMA,
    "helium": _decoder(GQA_HIDDEN, GATED_MLP),
    "hunyuan_v1_dense": LLAMA,
    "seed_oss": LLAMA,
    "arcee": UNGATED,
    "nemotron": UNGATED,
    "phi": _decoder(replace(GQA, output="dense"), PLAIN_MLP),
    "starcoder2": _decoder(GQA, CONV_MLP),
    "opt": _decoder(OPT_ATTENTION, OPT_MLP, "decoder.layers"),
    "hyperclovax": LLAMA,
    "paddleocr_vl_text": LLAMA,
    "granite_docling_text": LLAMA,
    "granite4_vision_text": LLAMA,
    "hunyuan_vl_text": LLAMA,
    "cohere_compass_text": LLAMA,
    "cosmos3_edge_text": _decoder(GQA, PLAIN_MLP),
    "qwen2_5_omni_text": QWEN2_VL,
    "gemma4_text": LLAMA,
    "gemma4_unified_text": LLAMA,
    "emu3_text_model": LLAMA,
    "t5": Text((T5_ENCODER, T5_DECODER), "encoder-decoder", base=""),
    "qwen2_vl_text": QWEN2_VL,
    "qwen2_5_vl_text": QWEN2_VL,
    "qwen3_vl_text": _decoder(GQA, GATED_MLP, deepstack="vision_config.deepstack_visual_indexes"),
    **MIXED_TEXTS,
    "clip_text_model": CLIP_TEXT,
    "siglip_text_model": CLIP_TEXT,
}
