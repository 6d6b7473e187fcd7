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
    stepped=("decoder_sparse_step", "mlp_only_layers"),
    deepstack=DEEPSTACK,
)
CROSS = replace(GQA_HIDDEN, module="cross_attn", key="cross_attn", optional=True)
MLLAMA_TEXT = replace(
    _layers(replace(GQA_HIDDEN, optional=True), CROSS, GATED_MLP), numbered=("cross_attention_layers",)
)
EXPERTS = Experts("mlp.experts", "num_experts_per_tok", stock="moe_intermediate_size", optional=True)
SHARED_EXPERTS = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
SHARED = Mlp(SHARED_EXPERTS, "mlp.shared_experts.down_proj", key="shared", optional=True)
ROUTED = (replace(GATED_MLP, optional=True), replace(EXPERTS, stock=None), SHARED)  # one field sizes both
KEPT = Mixer("self_attn.o_proj")  # its heads share a latent, or have a gate of their own
ROUTER = "a router sends its tokens to experts"
LFM3_MLP = Mlp(("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2", stock="intermediate_size")

MIXED_TOWERS: dict[str, Stacks] = {
    "glm4v_vision": GLM4V,
    "mllama_vision_model": (MLLAMA, MLLAMA_GLOBAL),
    "glm_ocr_vision": GLM4V,
    "glm4v_moe_vision": GLM4V,
    "exaone4_5_vision": replace(GLM4V, parts=(Mixer("attn.proj"), GATED_MLP)),
    "lfm3_vl_vision": replace(GLM4V, blocks="layers", parts=(Mixer("conv.out_proj"), LFM3_MLP)),
    "muse_glimmer_vision": replace(
        GLM4V, blocks="layers", parts=(Attention("attn", SEPARATE, "proj", patch=HEADS), PLAIN_MLP)
    ),
    "kimi_k25_vision": replace(
        GLM4V, blocks="layers", parts=(Attention("attn", SEPARATE, "proj", patch=HEADS), PLAIN_MLP)
    ),
    "llama4_vision_model": replace(
        GLM4V,
        blocks="model.layers",
        parts=(Attention("self_attn", SEPARATE, "o_proj", patch=HEADS), Mlp(("mlp.fc1",), "mlp.fc2")),
    ),
    "minimax_m3_vl_vision": replace(
        GLM4V, blocks="layers", parts=(Attention("self_attn", SEPARATE, "out_proj", patch=HEADS), PLAIN_MLP)
    ),
}
MIXED_TEXTS: dict[str, Text] = {
    "phi3": Text((PHI3,)),
    "glm4v_text": Text((_layers(GQA_HIDDEN, FUSED_MLP),)),
    "lfm2": Text((LFM2,), ungraphed="its convolutions keep a state beside the cache"),
    "qwen3_5_text": Text((QWEN3_5,), ungraphed="its linear attention keeps a state beside the cache"),
    "qwen3_vl_moe_text": Text((QWEN3_VL_MOE,), ungraphed="a router sends its tokens to experts"),
    "glm_ocr_text": Text((_layers(GQA_HIDDEN, FUSED_MLP),)),
    "glm4v_moe_text": Text((_layers(GQA, *ROUTED),), ungraphed=ROUTER),
    "qwen3_5_moe_text": Text(
        (
            _layers(
                replace(GQA, optional=True),
                Mixer("linear_attn.out_proj"),
                EXPERTS,
                Mlp(
                    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                    "mlp.shared_expert.down_proj",
                    key="shared",
                    stock="shared_expert_intermediate_size",
                ),
            ),
        ),
        ungraphed=ROUTER,
    ),
    "qwen3_omni_moe_text": Text((replace(QWEN3_VL_MOE),), ungraphed=ROUTER),
    "deepseek_ocr2_text": Text((_layers(GQA, *ROUTED),), ungraphed=ROUTER),
    "unlimited_ocr_text": Text((_layers(GQA, *ROUTED),), ungraphed=ROUTER),
    "deepseek_v3": Text((_layers(KEPT, *ROUTED),), ungraphed=ROUTER),
    "mistral_large4_text": Text((_layers(KEPT, *ROUTED),), ungraphed=ROUTER),
    "muse_glimmer_text": Text((_layers(KEPT, GATED_MLP),)),
    "lfm3": Text(
        (_layers(Mixer("conv.out_proj"), KEPT, LFM3_MLP),), ungraphed="its convolutions keep a state beside the cache"
    ),
    "step3p5": Text((_layers(KEPT, *ROUTED),), ungraphed=ROUTER),
    "llama4_text": Text((_layers(GQA),), ungraphed=ROUTER),
    "mllama_text_model": Text((MLLAMA_TEXT,), ungraphed="some of its blocks attend to the image, which is in no token"),
}
