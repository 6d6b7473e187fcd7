"""Towers and text models whose blocks are of several kinds, or whose projections share a linear."""

from __future__ import annotations

from dataclasses import replace

from slimvlm.compress.models.families.parts import (
    FUSED,
    FUSED_MLP,
    GATED,
    GATED_MLP,
    GQA,
    GQA_HIDDEN,
    GROUPS,
    HEADS,
    PLAIN_MLP,
    SEPARATE,
)
from slimvlm.compress.models.families.rows import Attention, Experts, Mixer, Mlp, Part, Stacks, Text, Tower

DEEPSTACK = "vision_config.deepstack_visual_indexes"


def _layers(*parts: Part) -> Tower:
    return Tower("language", "language", "text_config", "layers", parts)


GLM4V = Tower(  # its MLPs are as wide as what it gives: no stock cut of them
    "vision", "vision", "vision_config", "blocks", (FUSED, Mlp(GATED, "mlp.down_proj"))
)
MLLAMA = Tower(
    "vision",
    "vision",
    "vision_config",
    "transformer.layers",
    (Attention("self_attn", SEPARATE, "o_proj", patch=HEADS), PLAIN_MLP),
    numbered=("intermediate_layers_indices",),
    deepstack="vision_config.intermediate_layers_indices",
)
MLLAMA_GLOBAL = replace(
    MLLAMA, name="global", blocks="global_transformer.layers", depth=("num_global_layers",), numbered=(), deepstack=None
)

PHI3 = _layers(
    Attention(
        "self_attn",
        ("qkv_proj",),
        "o_proj",
        patch=(*GROUPS, ("config.num_attention_heads", "heads")),  # where k begins is asked of the config
    ),
    FUSED_MLP,
)
LFM2 = _layers(
    Attention("self_attn", SEPARATE, "out_proj", patch=GROUPS, optional=True),
    Mixer("conv.out_proj"),
    Mlp(("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2"),  # its width is rounded: no stock cut
)
QWEN3_5 = _layers(replace(GQA, optional=True), Mixer("linear_attn.out_proj"), GATED_MLP)
QWEN3_VL_MOE = replace(
    _layers(
        GQA,
        replace(GATED_MLP, optional=True),
        Experts("mlp.experts", "num_experts_per_tok", stock="moe_intermediate_size", optional=True),
    ),
    numbered=("mlp_only_layers",),
    deepstack=DEEPSTACK,
)
CROSS = replace(GQA_HIDDEN, module="cross_attn", key="cross_attn", optional=True)
MLLAMA_TEXT = replace(
    _layers(replace(GQA_HIDDEN, optional=True), CROSS, GATED_MLP), numbered=("cross_attention_layers",)
)

MIXED_TOWERS: dict[str, Stacks] = {
    "glm4v_vision": GLM4V,
    "mllama_vision_model": (MLLAMA, MLLAMA_GLOBAL),
}
MIXED_TEXTS: dict[str, Text] = {
    "phi3": Text((PHI3,)),
    "glm4v_text": Text((_layers(GQA_HIDDEN, FUSED_MLP),)),
    "lfm2": Text((LFM2,), ungraphed="its convolutions keep a state beside the cache"),
    "qwen3_5_text": Text((QWEN3_5,), ungraphed="its linear attention keeps a state beside the cache"),
    "qwen3_vl_moe_text": Text((QWEN3_VL_MOE,), ungraphed="a router sends its tokens to experts"),
    "mllama_text_model": Text((MLLAMA_TEXT,), ungraphed="some of its blocks attend to the image, which is in no token"),
}
