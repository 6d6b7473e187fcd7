"""Tiny models whose blocks are of several kinds, or whose projections share a linear."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers as tf
from tiny.sizes import IMAGE_TOKEN, PACKED, ROPE, TEXT, VISION, decoder_batch, pixels

Inputs = Callable[[int], dict[str, torch.Tensor]]
Built = tuple[torch.nn.Module, Inputs]
MROPE = {**ROPE, "partial_rotary_factor": 1.0}
POSITIONED = {**PACKED, "num_position_embeddings": 16}


def glm4v(ids: dict[str, int], inputs: Inputs) -> Built:
    """Gate and up fused in the text model; `ids` and `inputs` are those of Qwen-VL."""
    config = tf.Glm4vConfig(
        vision_config={**PACKED, "image_size": 16},
        text_config={**TEXT, "rope_parameters": MROPE},
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
        image_start_token_id=ids["vision_start_token_id"],
        image_end_token_id=ids["vision_end_token_id"],
        video_start_token_id=88,
        video_end_token_id=89,
    )
    return tf.Glm4vForConditionalGeneration(config), inputs


def qwen3_5(ids: dict[str, int], inputs: Inputs) -> Built:
    """A block of attention between blocks of linear attention."""
    text = {
        **TEXT,
        "head_dim": 8,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {**MROPE, "mrope_interleaved": True},
    }
    return tf.Qwen3_5ForConditionalGeneration(
        tf.Qwen3_5Config(vision_config=POSITIONED, text_config=text, **ids)
    ), inputs


def qwen3_vl_moe(ids: dict[str, int], inputs: Inputs) -> Built:
    """A block with one MLP, and one with four experts, of which two are picked for a token."""
    text = {
        **TEXT,
        "head_dim": 8,
        "rope_parameters": ROPE,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
        "tie_word_embeddings": False,
    }
    vision = {**POSITIONED, "deepstack_visual_indexes": [0]}
    return tf.Qwen3VLMoeForConditionalGeneration(
        tf.Qwen3VLMoeConfig(vision_config=vision, text_config=text, **ids)
    ), inputs


def lfm2_vl() -> Built:
    """A block of attention between convolutions."""
    vision = {name: value for name, value in VISION.items() if name != "image_size"}
    text = {**TEXT, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    config = tf.Lfm2VlConfig(
        vision_config=tf.Siglip2VisionConfig(**vision, num_patches=16, vision_use_head=False),
        text_config=tf.Lfm2Config(**text, block_auto_adjust_ff_dim=False),
        image_token_id=IMAGE_TOKEN,
        projector_hidden_size=24,
        downsample_factor=2,
    )
    return tf.Lfm2VlForConditionalGeneration(config), partial(_lfm2_inputs)


def _lfm2_inputs(batch: int) -> dict[str, torch.Tensor]:
    """An image of 4 x 4 patches, merged 2 x 2 into four tokens."""
    patches = torch.randn(batch, 16, 3 * 4 * 4, generator=torch.Generator().manual_seed(1))
    shapes, mask = torch.tensor([[4, 4]] * batch), torch.ones(batch, 16, dtype=torch.int64)
    return decoder_batch(batch, 4, {"pixel_values": patches, "spatial_shapes": shapes, "pixel_attention_mask": mask})


def mllama() -> Built:
    """A block of cross attention between blocks of self-attention, and a tower of two stacks."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "vision_output_dim": 64,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        "intermediate_layers_indices": [0],
    }
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return tf.MllamaForConditionalGeneration(config), _mllama_inputs


def _mllama_inputs(batch: int) -> dict[str, torch.Tensor]:
    """An image of two tiles each, that every token may look at."""
    tiles = torch.stack([pixels(batch), pixels(batch, seed=2)], dim=1)[:, None]
    ratios, mask = torch.tensor([[2]] * batch), torch.ones(batch, 1, 2, dtype=torch.int64)
    made = decoder_batch(batch, 1, {"pixel_values": tiles, "aspect_ratio_ids": ratios, "aspect_ratio_mask": mask})
    return {**made, "cross_attention_mask": torch.ones(*made["input_ids"].shape, 1, 2, dtype=torch.int64)}
