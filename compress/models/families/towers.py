"""Vision towers, by the model type of their config: where its module has the blocks, and what is in them.

A row holds in every family whose tower this is (joins.py).
"""

from __future__ import annotations

from dataclasses import replace

from slimvlm.compress.models.families.mixed import MIXED_TOWERS
from slimvlm.compress.models.families.parts import (
    ENCODER,
    FUSED,
    GATED_MLP,
    GROUPS,
    HEADS,
    PLAIN_MLP,
    RATIO_MLP,
    SEPARATE,
)
from slimvlm.compress.models.families.rows import Attention, Mlp, Stacks, Tower


def _vision(blocks: str, *parts: Attention | Mlp, before: tuple[str, ...] = ()) -> Tower:
    return Tower("vision", "vision", "vision_config", blocks, parts, before=before)


CLASS = ("embeddings.class_embedding",)
CLS = ("embeddings.cls_token",)

VIT = _vision("encoder.layers", ENCODER, PLAIN_MLP)
CLIP = replace(VIT, before=CLASS)
SIGLIP = replace(VIT, pooled="vision_use_head")
DINOV2 = _vision(
    "encoder.layer",
    Attention("attention", SEPARATE, "o_proj", patch=(("num_attention_heads", "heads"),)),
    RATIO_MLP,
    before=CLS,
)
PIXTRAL = _vision(
    "transformer.layers",
    Attention("attention", SEPARATE, "o_proj", patch=HEADS),
    Mlp(("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward.down_proj", stock="intermediate_size"),
)
AIMV2 = _vision(
    "encoder.layers",
    Attention("attention", SEPARATE, "out_proj", patch=HEADS),
    Mlp(("ffn.gate_proj", "ffn.up_proj"), "ffn.down_proj", stock="intermediate_size"),
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
    before=CLS,
)
BLIP2 = _vision(
    "encoder.layers",
    Attention("self_attn", ("qkv",), "projection", patch=HEADS, forward="blip2_vision"),
    PLAIN_MLP,
    before=CLASS,
)
QWEN2 = _vision("blocks", FUSED, RATIO_MLP)
QWEN2_5 = replace(
    _vision("blocks", FUSED, GATED_MLP),
    numbered=("fullatt_block_indexes",),
    windows=("window_size", "fullatt_block_indexes"),
)
QWEN3 = replace(
    _vision("blocks", FUSED, Mlp(("mlp.linear_fc1",), "mlp.linear_fc2", stock="intermediate_size")),
    numbered=("deepstack_visual_indexes",),
    deepstack="vision_config.deepstack_visual_indexes",
)
JANUS = _vision(
    "encoder.layers",
    Attention("self_attn", SEPARATE, "projection_layer", patch=(*HEADS, ("embed_dim", "width"))),
    RATIO_MLP,
)
GOT_OCR2 = _vision(
    "layers",
    Attention("attn", ("qkv",), "proj", head_dim="", patch=(("num_attention_heads", "heads"),)),
    Mlp(("mlp.lin1",), "mlp.lin2", stock="mlp_dim"),
)
GEMMA4 = _vision(
    "encoder.layers",
    Attention("self_attn", ("q_proj.linear", "k_proj.linear", "v_proj.linear"), "o_proj.linear", patch=GROUPS),
    Mlp(("mlp.gate_proj.linear", "mlp.up_proj.linear"), "mlp.down_proj.linear", stock="intermediate_size"),
)

TOWERS: dict[str, Stacks] = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "mlcd_vision_model": CLIP,
    "aimv2_vision_model": AIMV2,
    "pixtral": PIXTRAL,
    "dinov2": DINOV2,
    "dinov2_with_registers": replace(DINOV2, before=(*CLS, "embeddings.register_tokens")),
    "internvl_vision": INTERNVL,
    "idefics2_vision": VIT,
    "idefics3_vision": VIT,
    "smolvlm_vision": VIT,
    "blip_2_vision_model": BLIP2,
    "instructblip_vision_model": BLIP2,
    "qwen2_vl_vision": QWEN2,
    "qwen2_5_vl_vision": QWEN2_5,
    "qwen2_5_omni_vision_encoder": replace(
        QWEN2_5, parts=(Attention("attn", ("q", "k", "v"), "proj", patch=HEADS), GATED_MLP)
    ),
    "qwen3_vl_vision": QWEN3,
    "ovis2_vision": replace(AIMV2, blocks="transformer.encoder.layers"),
    "janus_vision_model": JANUS,
    "got_ocr2_vision": GOT_OCR2,
    "pp_chart2table_vision": GOT_OCR2,
    "qianfan_ocr_vision": replace(INTERNVL, blocks="layers"),
    "paddleocr_vl_vision": replace(VIT, blocks="vision_model.encoder.layers"),
    "cosmos3_edge_vision": VIT,
    "video_llama_3_vision": VIT,
    "granite_docling_vision": VIT,
    "siglip2_vision_model": SIGLIP,
    "qwen3_vl_moe_vision": QWEN3,
    "qwen3_omni_moe_vision_encoder": QWEN3,
    "qwen3_5_moe_vision": replace(QWEN3, numbered=(), deepstack=None),
    "step3p5_vision": replace(VIT, blocks="layers", parts=(ENCODER, RATIO_MLP)),
    "qwen3_5_vision": replace(QWEN3, numbered=(), deepstack=None),
    "instructblipvideo_vision_model": BLIP2,
    "gemma4_vision": GEMMA4,
    "hunyuan_vl_vision": replace(VIT, blocks="layers", parts=(replace(ENCODER, output="o_proj"), PLAIN_MLP)),
    "cohere_compass_vision": QWEN3,
    **MIXED_TOWERS,
}
