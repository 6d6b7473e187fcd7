"""A tiny model of every family with a name of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from tiny import mixed
from tiny.joins import JOINS, Built, one_image
from tiny.sizes import IMAGE_TOKEN, PACKED, ROPE, TEXT, VISION, VOCAB, decoder_batch, pixels, text_ids
from tiny.texts import TEXTS


def _qwen_inputs(b: int) -> dict[str, torch.Tensor]:
    """One 16 x 16 image of 4 x 4 patches (patch 4, temporal 2), merged 2 x 2 into four tokens."""
    patches = torch.randn(b * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[1, 4, 4]] * b)
    batch = decoder_batch(b, 4, {"pixel_values": patches, "image_grid_thw": grid})
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    return batch


QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": IMAGE_TOKEN + 1,
    "vision_start_token_id": IMAGE_TOKEN + 2,
    "vision_end_token_id": IMAGE_TOKEN + 3,
}


def _qwen2_vl() -> Built:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
    }
    config = tf.Qwen2VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": ROPE}, **QWEN_IDS)
    return tf.Qwen2VLForConditionalGeneration(config), _qwen_inputs


def _qwen2_5_vl() -> Built:
    vision = {
        **PACKED,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": ROPE}, **QWEN_IDS)
    return tf.Qwen2_5_VLForConditionalGeneration(config), _qwen_inputs


def _qwen3_vl() -> Built:
    vision = {
        **PACKED,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {**TEXT, "head_dim": 8, "rope_parameters": ROPE}
    config = tf.Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_IDS)
    return tf.Qwen3VLForConditionalGeneration(config), _qwen_inputs


QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 32,
    "vocab_size": VOCAB,
}


def _blip2(text: str) -> Built:
    config = tf.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=TEXTS[text](),
        num_query_tokens=5,
        image_text_hidden_size=16,
        image_token_index=IMAGE_TOKEN,
    )

    def inputs(b: int) -> dict[str, torch.Tensor]:
        batch = one_image(b, 5)
        return {**batch, "labels": text_ids(b, 4, seed=3)} if text == "t5" else batch

    return tf.Blip2ForConditionalGeneration(config), inputs


def _dual(model_class: type, config_class: type) -> Built:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
    }
    kwargs = {"projection_dim": 16} if config_class is tf.CLIPConfig else {"projection_size": 32}
    config = config_class(
        text_config={**text, "eos_token_id": 2, **({} if "projection_dim" in kwargs else kwargs)}, vision_config=VISION
    )

    def inputs(b: int) -> dict[str, torch.Tensor]:
        ids = text_ids(b, 8)
        ids[:, -1] = 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(b)}

    return model_class(config), inputs


FACTORIES: dict[str, Callable[[], Built]] = {
    "llava": lambda: JOINS["llava"]("clip_vision_model", "llama"),
    "llava_dinov2": lambda: JOINS["llava"]("dinov2", "llama"),
    "llava_next": lambda: JOINS["llava_next"]("clip_vision_model", "llama"),
    "llava_onevision": lambda: JOINS["llava_onevision"]("siglip_vision_model", "qwen2"),
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": lambda: JOINS["smolvlm"]("smolvlm_vision", "llama"),
    "idefics3": lambda: JOINS["idefics3"]("idefics3_vision", "llama"),
    "paligemma": lambda: JOINS["paligemma"]("siglip_vision_model", "gemma"),
    "internvl": lambda: JOINS["internvl"]("internvl_vision", "qwen2"),
    "blip2_opt": lambda: _blip2("opt"),
    "blip2_t5": lambda: _blip2("t5"),
    "clip": lambda: _dual(tf.CLIPModel, tf.CLIPConfig),
    "siglip": lambda: _dual(tf.SiglipModel, tf.SiglipConfig),
}
MIXED: dict[str, Callable[[], Built]] = {  # blocks of several kinds, or projections that share a linear
    "glm4v": lambda: mixed.glm4v(QWEN_IDS, _qwen_inputs),
    "qwen3_5": lambda: mixed.qwen3_5(QWEN_IDS, _qwen_inputs),
    "qwen3_vl_moe": lambda: mixed.qwen3_vl_moe(QWEN_IDS, _qwen_inputs),
    "lfm2_vl": mixed.lfm2_vl,
    "mllama": mixed.mllama,
    "llava (clip, phi3)": lambda: JOINS["llava"]("clip_vision_model", "phi3"),
}
