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
        per_token: inputs with a number per token, and the one that stands for the image.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    image: Prepare | None = None
    tokens: int | None = None
    first: bool = False
    per_token: Mapping[str, int] = field(default_factory=dict)


PLAIN = Facts()
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
DEEP = {"vision_config": {"deepstack_visual_indexes": [0]}}
DAVIT = {"embed_dim": [16, 16, 32, 32], "depths": [1] * 4, "num_heads": [2, 2, 4, 4], "num_groups": [2, 2, 4, 4]}
FACTS: dict[str, Facts] = {
    "aria": Facts({"projector_patch_to_query_dict": {16: 4}}),
    "blip": Facts(tokens=0, first=True),
    "blip-2": Facts(tokens=4, first=True),
    "cohere_compass": Facts(
        {"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}, **DEEP}
    ),
    "cosmos3_omni": Facts(DEEP),
    "deepseek_vl_hybrid": Facts(image=images.two_sizes),
    "florence2": Facts({"vision_config": DAVIT}),
    "fuyu": Facts(image=images.flat, tokens=16),
    "gemma3": Facts({"mm_tokens_per_image": 4}),
    "granite_docling": Facts(image=images.listed),
    "instructblip": Facts(image=images.questioned, tokens=4, first=True),
    "kimi_k25": Facts(image=images.square_patches),
    "llama4": Facts({"vision_config": {"intermediate_size": 128}}),
    "paddleocr_vl": Facts(image=images.square_patches),
    "paligemma": Facts(per_token={"token_type_ids": 0}),
    "qwen3_vl": Facts({**DEEP, "text_config": {"bos_token_id": 1, "eos_token_id": 2}}),
    "shieldgemma2": Facts({"mm_tokens_per_image": 4}),
    "video_llama_3": Facts(image=images.merged),
    "vipllava": Facts({"vision_feature_layer": [-1, -2]}),
}

REASONS = {  # where the structure does not fit, in the place of what the job says
    "diffusion_gemma": "it writes a block of tokens at once by diffusion, not one after the other",
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
