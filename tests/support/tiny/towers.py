"""A tiny config per vision tower that goes into many families, by its model type (see TOWERS in slimvlm)."""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf
from tiny.sizes import VISION

RATIOED = {**{name: value for name, value in VISION.items() if name != "intermediate_size"}, "mlp_ratio": 2}

TOWERS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "clip_vision_model": lambda: tf.CLIPVisionConfig(**VISION),
    "siglip_vision_model": lambda: tf.SiglipVisionConfig(**VISION, vision_use_head=False),
    "dinov2": lambda: tf.Dinov2Config(**RATIOED),
    "dinov2_with_registers": lambda: tf.Dinov2WithRegistersConfig(**RATIOED, num_register_tokens=3),
    "internvl_vision": lambda: tf.InternVLVisionConfig(
        **{**VISION, "image_size": [16, 16], "patch_size": [4, 4], "use_qk_norm": True}
    ),
    "pixtral": lambda: tf.PixtralVisionConfig(**VISION),
    "mlcd_vision_model": lambda: tf.MLCDVisionConfig(**VISION),
    "aimv2_vision_model": lambda: tf.Aimv2VisionConfig(**VISION, use_head=False),
}
BEFORE = {"clip_vision_model": 1, "dinov2": 1, "dinov2_with_registers": 4, "internvl_vision": 1, "mlcd_vision_model": 1}
"""Tokens that a tower puts before those of the patches."""
