"""Families, by the model type of their config: what joins a tower (towers.py) and a text model (texts.py).

Where transformers builds tower and text model from whatever configs it is given, any two of the tables make a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from slimvlm.compress.models.families.parts import SEPARATE
from slimvlm.compress.models.families.rows import Export, Join, Resampler

Names = Mapping[tuple[str, str], str]

PROJECTOR = ("model.multi_modal_projector",)
SELECTED = "vision_feature_layer"
CROPPED = "vision_feature_select_strategy"
POOLED, SINGLE = Export(), Export("single")
PERCEIVER = Resampler(
    "model.connector.perceiver_resampler",
    "model.connector.perceiver_resampler.latents",
    "self_attn",
    SEPARATE,
    beside=True,
    projected=True,
)
MERGER = ("model.visual.merger",)


def _towered(names: Names, export: Export) -> Join:
    return Join(names, "model.vision_tower", "model.language_model", PROJECTOR, export)


def _selecting(names: Names, export: Export, cropped: str = CROPPED) -> Join:
    return replace(_towered(names, export), states=SELECTED, cropped=cropped)


def _qwen(name: str, export: Export, *projectors: str) -> Join:
    names = {(f"{name}_vision", f"{name}_text"): name}
    return Join(names, "model.visual", "model.language_model", (*MERGER, *projectors), export)


def _idefics(name: str) -> Join:
    return Join(
        {(f"{name}_vision", "llama"): name},
        "model.vision_model",
        "model.text_model",
        ("model.connector",),
        Export("masked_tiles"),
    )


def _glm(names: Names = MappingProxyType({})) -> Join:
    """GLM-4V and its like."""
    projector = ("model.visual.downsample", *MERGER)
    return Join(names, "model.visual", "model.language_model", projector, Export("single", positions="mrope"))


def _joined(vision: str, projector: str, export: Export = POOLED, doubled: tuple[str, ...] = ()) -> Join:
    return Join({}, vision, "model.language_model", (projector,), export, doubled=doubled)


def _queried(names: Names) -> Join:
    resampler = Resampler("qformer", "query_tokens", "crossattention")
    return Join(names, "vision_model", "language_model", ("language_projection",), resampler=resampler, headed=True)


def _dual(name: str, projector: tuple[str, ...], output: tuple[str, str]) -> Join:
    names = {(f"{name}_vision_model", f"{name}_text_model"): name}
    export = Export(image_output=output[0], text_output=output[1])
    return Join(names, "vision_model", "text_model", projector, export, contrastive=True)


JOINS: dict[str, Join] = {
    "llava": _selecting(
        {("dinov2", "llama"): "llava_dinov2", ("clip_vision_model", "llama"): "llava"},
        Export("select"),
    ),
    "llava_next": _selecting({("clip_vision_model", "llama"): "llava_next"}, Export("tiles")),
    "llava_onevision": _selecting({("siglip_vision_model", "qwen2"): "llava_onevision"}, Export("tiles")),
    "qwen2_vl": _qwen("qwen2_vl", Export("patches", positions="mrope", flat_config=True)),
    "qwen2_5_vl": _qwen("qwen2_5_vl", Export("patches", positions="mrope", genai="qwen2_5_vl")),
    "qwen3_vl": _qwen(
        "qwen3_vl", Export("patches", positions="mrope", genai="qwen3_vl"), "model.visual.deepstack_merger_list"
    ),
    "qwen3_vl_moe": _qwen("qwen3_vl_moe", Export("patches", positions="mrope"), "model.visual.deepstack_merger_list"),
    "qwen3_5": _qwen("qwen3_5", Export("patches", positions="mrope")),
    "glm4v": _glm({("glm4v_vision", "glm4v_text"): "glm4v"}),
    "glm46v": _glm(),
    "glmga": _glm(),
    "glm_ocr": _glm(),
    "glm4v_moe": _glm(),
    "exaone4_5": _joined("model.visual", "model.visual.merger", SINGLE),
    "qwen3_5_moe": _joined("model.visual", "model.visual.merger", Export("patches", positions="mrope")),
    "qwen3_omni_moe_thinker": _joined("model.visual", "model.visual.merger", Export("patches", positions="mrope")),
    "lfm3_vl": _towered({}, POOLED),
    "muse_glimmer": _joined(
        "model.vision_tower", "model.vision_projection", Export("single", scaled="output_multiplier", capped=True)
    ),
    "kimi_k25": _joined("model.vision_tower", "model.mm_projector", SINGLE),
    "mistral_large4": _selecting({}, SINGLE),
    "step3p7": _joined("model.vision_model", "model.multi_modal_projector"),
    "unlimited_ocr": _joined("", "model.multi_modal_projector"),
    "deepseek_ocr2": _joined("", "model.multi_modal_projector"),
    "gemma4_unified": _joined(
        "",
        "model.embed_vision",
        Export("single", image_blocks=True, silent=("image_token_id", "video_token_id", "audio_token_id"), capped=True),
    ),
    "llama4": Join(
        {}, "vision_model", "language_model", ("multi_modal_projector",), headed=True, doubled=("language",)
    ),
    "lfm2_vl": _towered({("siglip2_vision_model", "lfm2"): "lfm2_vl"}, Export()),
    "mllama": Join(
        {("mllama_vision_model", "mllama_text_model"): "mllama"},
        "model.vision_model",
        "model.language_model",
        PROJECTOR,
    ),
    "smolvlm": _idefics("smolvlm"),
    "idefics3": _idefics("idefics3"),
    "idefics2": replace(
        _idefics("idefics2"),
        names={("idefics2_vision", "mistral"): "idefics2"},
        projector=("model.connector.modality_projection",),
        export=SINGLE,
        resampler=PERCEIVER,
        shared=True,
    ),
    "paligemma": replace(
        _towered({("siglip_vision_model", "gemma"): "paligemma"}, Export(first_position=1, prefix=True, capped=True)),
        texts=("gemma", "gemma2", "gemma3_text"),  # whose configs say whether a prompt attends in both directions
    ),
    "vipllava": _selecting({("clip_vision_model", "llama"): "vipllava"}, Export(), "default"),
    "aya_vision": _selecting({("siglip_vision_model", "cohere2"): "aya_vision"}, Export()),
    "cohere2_vision": _towered({("siglip_vision_model", "cohere2"): "cohere2_vision"}, Export()),
    "mistral3": _selecting({("pixtral", "mistral"): "mistral3"}, SINGLE),
    "gemma3": replace(
        _towered({("siglip_vision_model", "gemma3_text"): "gemma3"}, Export(image_blocks=True)),
        features="mm_tokens_per_image",
    ),
    "internvl": _selecting({("internvl_vision", "qwen2"): "internvl"}, Export()),
    "blip-2": _queried({("blip_2_vision_model", "opt"): "blip2_opt", ("blip_2_vision_model", "t5"): "blip2_t5"}),
    "instructblip": _queried({}),
    "llava_next_video": _selecting({}, Export("tiles")),
    "got_ocr2": _towered({}, Export()),
    "pp_chart2table": _towered({}, Export()),
    "qianfan_ocr": _selecting({}, Export()),
    "ovis2": _joined("model.vision_tower", "model.visual_embeddings_table"),
    "deepseek_vl": _joined("model.vision_model", "model.aligner"),
    "janus": _joined("model.vision_model", "model.aligner"),
    "lighton_ocr": _joined("model.vision_encoder", "model.vision_projection", SINGLE),
    "paddleocr_vl": _joined("model.visual", "model.projector", Export("single", positions="mrope")),
    "hyperclovax_vision_v2": _joined("model.vision_model", "model.projector", SINGLE),
    "cosmos3_omni": Join(
        {},
        "model.visual",
        "model.language_model",
        (*MERGER, "model.visual.deepstack_merger_list"),
        Export("patches", positions="mrope"),
    ),
    "cosmos3_edge": _joined("model.visual", "model.projector", Export("single", positions="mrope")),
    "video_llama_3": _joined("model.vision_model", "model.projector", SINGLE),
    "granite_docling": Join({}, "model.vision_model", "model.text_model", ("model.vision_model.connector",), Export()),
    "deepseek_vl_hybrid": _joined("model.vision_model", "model.aligner", SINGLE),
    "qwen2_5_omni_thinker": _joined("model.visual", "model.visual.merger", Export("single", positions="mrope")),
    "hunyuan_vl": _joined("model.vision_tower", "model.vision_tower.patch_merger", SINGLE),
    "cohere_compass": _joined(
        "model.visual", "model.visual.merger", Export("patches", positions="mrope", scaled="logit_scale")
    ),
    "video_llava": _joined("model.image_tower", "model.multi_modal_projector", doubled=("vision",)),
    "emu3": Join({}, "", "model.text_model", (), SINGLE),
    "instructblipvideo": _queried({}),
    "gemma4": Join(
        {}, "model.vision_tower", "model.language_model", ("model.embed_vision",), SINGLE, doubled=("language",)
    ),
    "clip": _dual("clip", ("visual_projection", "text_projection"), ("image_embeds", "text_embeds")),
    "siglip": _dual("siglip", ("vision_model.head", "text_model.head"), ("pooler_output", "pooler_output")),
}
