"""What the generic way does not know of a model type: fields of its tiny config, and how it takes an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tiny_types import images

Prepare = Callable[[Any, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Facts:
    """Of one model type.

    Attributes:
        config: fields over those of the shrinker; None takes one out.
        image: (config, pixels [3, 16, 16]) -> tensors of one image; default: what its forward's inputs tell.
        tokens: placeholders of an image, where the model has no method that gives an image's features.
        first: the image is put before the text without a placeholder.
        around: tokens before and behind an image's placeholders, by which the model finds it.
        per_token: inputs with a number per token, and the one that stands for the image.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    image: Prepare | None = None
    tokens: int | None = None
    first: bool = False
    around: tuple[int, ...] = ()
    per_token: Mapping[str, int] = field(default_factory=dict)


PLAIN = Facts()
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
DEEP = {"vision_config": {"deepstack_visual_indexes": [0]}}
DAVIT = {"embed_dim": [16, 16, 32, 32], "depths": [1] * 4, "num_heads": [2, 2, 4, 4], "num_groups": [2, 2, 4, 4]}
KINDS = ["linear_attention", "full_attention"]
CODES = {f"IMGIMG{'ABCDEFGH'[code]}Z": 10 + code for code in range(8)}
VISUAL = {f"<|visual token {code:06d}|>": 10 + code for code in range(8)}
VQ = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}
NARROW = {"downsample_channels": [32, 32], "scale": 0.5}
MINICPM = {"text_config": {"layer_types": KINDS}, "vision_config": {"insert_layer_id": 0}, "insert_layer_id": 0}
GEMMA4 = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pooling_kernel_size": 2,
    "patch_size": 4,
    "position_embedding_size": 16,
}
FACTS: dict[str, Facts] = {
    "aria": Facts({"projector_patch_to_query_dict": {16: 4}}),
    "blip": Facts(tokens=0, first=True),
    "blip-2": Facts(tokens=4, first=True),
    "chameleon": Facts(
        {"vocabulary_map": {"<image>": 90, **CODES}, "vq_config": {**VQ, "num_embeddings": 8}}, tokens=16
    ),
    "cohere_compass": Facts(
        {"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}, **DEEP}
    ),
    "cosmos3_omni": Facts(DEEP),
    "deepseek_ocr2": Facts(
        {"vision_config": {"sam_config": NARROW}, "text_config": {"mlp_layer_types": ["dense"] * 2}}
    ),
    "deepseek_vl_hybrid": Facts({"high_res_vision_config": {"global_attn_indexes": [0]}}, image=images.two_sizes),
    "emu3": Facts(
        {
            "vocabulary_map": {"<image>": 90, "<|extra_200|>": 20, **VISUAL},
            "vq_config": {**VQ, "codebook_size": 8, "embed_dim": 4, "latent_channels": 4},
        },
        image=images.sized,
        tokens=20,
    ),
    "florence2": Facts({"vision_config": DAVIT}),
    "fuyu": Facts(image=images.flat, tokens=16),
    "gemma3": Facts({"mm_tokens_per_image": 4}),
    "gemma4": Facts({"vision_config": GEMMA4}, image=images.placed),
    "gemma4_unified": Facts({"vision_config": {**GEMMA4, "model_type": "gemma4_unified_vision"}}, image=images.placed),
    "granite4_vision": Facts(
        {
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [0, 0, 1, 1],
            "downsample_rate": "1/2",
            "qformer_config": {"num_attention_heads": 1, "hidden_size": 64},
        }
    ),
    "granite_docling": Facts(image=images.listed),
    "hunyuan_vl": Facts({"text_config": {"head_dim": 8}}),
    "instructblip": Facts(image=images.questioned, tokens=4, first=True),
    "instructblipvideo": Facts({"video_token_index": 90}, image=images.questioned_frames, tokens=16, first=True),
    "kimi_k25": Facts({"projection_hidden_size": 32, "text_config": {"head_dim": 4}}, image=images.square_patches),
    "lfm2_vl": Facts({"text_config": {"layer_types": ["conv", "full_attention"]}}, image=images.shaped),
    "mllama": Facts(
        {
            "vision_config": {
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            "text_config": {"cross_attention_layers": [1]},
        },
        image=images.two_tiles,
        tokens=1,
    ),
    "lfm3_vl": Facts({"text_config": {"layer_types": ["conv", "full_attention"]}}),
    "llama4": Facts({"vision_config": {"intermediate_size": 128}}),
    "minicpm_ocr": Facts(MINICPM, image=images.in_a_row),
    "minicpmv4_6": Facts(MINICPM, image=images.in_a_row),
    "minicpmv4_7": Facts(MINICPM, image=images.in_a_row),
    "muse_glimmer": Facts({"out_hidden_size": 128}),
    "paddleocr_vl": Facts(image=images.square_patches),
    "paligemma": Facts(per_token={"token_type_ids": 0}),
    "qwen2_5_omni_thinker": Facts({"vision_start_token_id": 92, "vision_end_token_id": 93}, around=(92, 93)),
    "qwen3_5": Facts({"text_config": {"layer_types": KINDS}}),
    "qwen3_5_moe": Facts({"text_config": {"layer_types": KINDS}}),
    "qwen3_omni_moe_thinker": Facts({"vision_start_token_id": 92, "vision_end_token_id": 93, **DEEP}),
    "qwen3_vl": Facts({**DEEP, "text_config": {"bos_token_id": 1, "eos_token_id": 2}}),
    "qwen3_vl_moe": Facts(DEEP),
    "qwen4_exp": Facts({"text_config": {"layer_types": KINDS}}),
    "shieldgemma2": Facts({"mm_tokens_per_image": 4}),
    "step3p7": Facts({"text_config": {"sliding_window": 128}}),
    "t5gemma2": Facts({"encoder": {"mm_tokens_per_image": 4}}),
    "unlimited_ocr": Facts({"vision_config": {"sam_config": NARROW}}),
    "video_llama_3": Facts(image=images.merged),
    "vipllava": Facts({"vision_feature_layer": [-1, -2]}),
}
TIMM = "its vision tower is one of timm's, whose sizes no field of a config says"

REASONS = {  # where the structure does not fit, in the place of what the job says
    "molmo2": "its pooling numbers the patches of a whole batch, which samples joined to a batch do not",
    "diffusion_gemma": "it writes a block of tokens at once by diffusion, not one after the other",
    "fast_vlm": TIMM,
    "gemma3n": TIMM,
    "perception_lm": TIMM,
    "kosmos-2": "a norm over all heads is inside its attention: without one of them the others come out differently",
    "kosmos-2.5": "a norm over all channels is inside its MLPs: without one of them the others come out differently",
    "evolla": "it reads proteins, no images",
    "git": "the image's features stand before the text inside the model, so its logits are not those of the text alone",
    "mistral4": "the class that is mapped is a text model, without images",
    "pi0": "it answers with the movements of a robot, not with text",
    "pix2struct": "it has no text input: the question is drawn into the image",
    "pp_formulanet": "it has no text input: an image goes in, a formula comes out",
    "shieldgemma2": "a classifier, whose checkpoints transformers itself does not read into the class that is mapped",
    "udop": "it reads words with their boxes on the page beside the image",
    "vision-encoder-decoder": "it has no text input: an image goes in, a text comes out",
}
