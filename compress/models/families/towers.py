"""Vision towers, by the model type of their config: where its module has the blocks, and what is in them.

A row holds in every family whose tower this is (joins.py).
"""

from __future__ import annotations

from dataclasses import replace

from slimvlm.compress.models.families.parts import (
    ENCODER,
    FUSED,
    GATED_MLP,
    HEADS,
    PLAIN_MLP,
    SEPARATE,
    UNSIZED_MLP,
)
from slimvlm.compress.models.families.rows import Attention, Mlp, Tower


def _vision(blocks: str, *parts: Attention | Mlp) -> Tower:
    return Tower("vision", "vision", "vision_config", blocks, parts)


CLIP = _vision("encoder.layers", ENCODER, PLAIN_MLP)
SIGLIP = replace(CLIP, pooled="vision_use_head")
DINOV2 = _vision(
    "encoder.layer",
    Attention("attention", SEPARATE, "o_proj", patch=(("num_attention_heads", "heads"),)),
    UNSIZED_MLP,
)
INTERNVL = _vision(
    "encoder.layer",
    Attention(
        "attention",
        SEPARATE,
        "projection_layer",
        norms=("q_norm", "k_norm"),
        patch=(*HEADS, ("embed_dim", "width")),
    ),
    PLAIN_MLP,
)
BLIP2 = _vision(
    "encoder.layers", Attention("self_attn", ("qkv",), "projection", patch=HEADS, forward="blip2_vision"), PLAIN_MLP
)
QWEN2 = _vision("blocks", FUSED, UNSIZED_MLP)
QWEN2_5 = replace(_vision("blocks", FUSED, GATED_MLP), numbered=("fullatt_block_indexes",))
QWEN3 = replace(
    _vision("blocks", FUSED, Mlp(("mlp.linear_fc1",), "mlp.linear_fc2", stock="intermediate_size")),
    numbered=("deepstack_visual_indexes",),
    deepstack="vision_config.deepstack_visual_indexes",
)

TOWERS: dict[str, Tower] = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "dinov2": DINOV2,
    "internvl_vision": INTERNVL,
    "idefics3_vision": CLIP,
    "smolvlm_vision": CLIP,
    "blip_2_vision_model": BLIP2,
    "qwen2_vl_vision": QWEN2,
    "qwen2_5_vl_vision": QWEN2_5,
    "qwen3_vl_vision": QWEN3,
}
