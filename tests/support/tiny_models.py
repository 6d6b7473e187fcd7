"""Tiny random models of every supported family, built in-process from real transformers configs.

Grouped-query attention is real wherever the family has it: 4 query heads on 2 key-value heads, so that both
attention units (whole KV group, query slot) can be cut. Weights are seeded; a second call gives the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import transformers as tf

VOCAB = 96
IMAGE_TOKEN = 90
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Tiny:
    """A tiny model, and a function giving a batch (with labels) of `batch` examples for its forward."""

    model: torch.nn.Module
    inputs: Callable[[int], dict[str, torch.Tensor]]


def _text_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, IMAGE_TOKEN - 1, (batch, length), generator=generator)


def _pixels(batch: int, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _decoder_batch(batch: int, image_tokens: int, extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`image_tokens` placeholders, then nine text tokens of which the last four are supervised."""
    text = _text_ids(batch, 9)
    ids = torch.cat([torch.full((batch, image_tokens), IMAGE_TOKEN), text], dim=1)
    labels = ids.clone()
    labels[:, :-4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra}


def _llava(tower: tf.PreTrainedConfig, strategy: str = "default") -> tuple[torch.nn.Module, Callable]:
    config = tf.LlavaConfig(
        vision_config=tower,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    tokens = 16 + (strategy == "full")
    return tf.LlavaForConditionalGeneration(config), lambda b: _decoder_batch(b, tokens, {"pixel_values": _pixels(b)})


def _dinov2() -> tf.Dinov2Config:
    sizes = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    return tf.Dinov2Config(**sizes, mlp_ratio=2)


def _llava_next() -> tuple[torch.nn.Module, Callable]:
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
    )

    def inputs(b: int) -> dict[str, torch.Tensor]:
        pixels = torch.stack([_pixels(b), _pixels(b, seed=2)], dim=1)  # base image + one tile
        sizes = torch.tensor([[16, 16]] * b)
        return _decoder_batch(b, 16 + 20, {"pixel_values": pixels, "image_sizes": sizes})

    return tf.LlavaNextForConditionalGeneration(config), inputs


def _llava_onevision() -> tuple[torch.nn.Module, Callable]:
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_index=IMAGE_TOKEN,
        video_token_index=IMAGE_TOKEN + 1,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
    )

    def inputs(b: int) -> dict[str, torch.Tensor]:
        pixels = torch.stack([_pixels(b), _pixels(b, seed=2)], dim=1)
        sizes = torch.tensor([[16, 16]] * b)
        return _decoder_batch(b, 16 + 20, {"pixel_values": pixels, "image_sizes": sizes})

    return tf.LlavaOnevisionForConditionalGeneration(config), inputs


def _qwen_inputs(b: int) -> dict[str, torch.Tensor]:
    """One 16 x 16 image of 4 x 4 patches (patch 4, temporal 2), merged 2 x 2 into four tokens."""
    patches = torch.randn(b * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[1, 4, 4]] * b)
    batch = _decoder_batch(b, 4, {"pixel_values": patches, "image_grid_thw": grid})
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    return batch


QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": IMAGE_TOKEN + 1,
    "vision_start_token_id": IMAGE_TOKEN + 2,
    "vision_end_token_id": IMAGE_TOKEN + 3,
}


def _qwen2_vl() -> tuple[torch.nn.Module, Callable]:
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


def _qwen2_5_vl() -> tuple[torch.nn.Module, Callable]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = tf.Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": ROPE}, **QWEN_IDS)
    return tf.Qwen2_5_VLForConditionalGeneration(config), _qwen_inputs


def _qwen3_vl() -> tuple[torch.nn.Module, Callable]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {**TEXT, "head_dim": 8, "rope_parameters": ROPE}
    config = tf.Qwen3VLConfig(vision_config=vision, text_config=text, **QWEN_IDS)
    return tf.Qwen3VLForConditionalGeneration(config), _qwen_inputs


def _idefics_like(model_class: type, config_class: type) -> tuple[torch.nn.Module, Callable]:
    config = config_class(
        vision_config=VISION,
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
    )
    return model_class(config), lambda b: _decoder_batch(b, 4, {"pixel_values": _pixels(b)[:, None]})


def _paligemma() -> tuple[torch.nn.Module, Callable]:
    config = tf.PaliGemmaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )

    def inputs(b: int) -> dict[str, torch.Tensor]:
        batch = _decoder_batch(b, 16, {"pixel_values": _pixels(b)})
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch

    return tf.PaliGemmaForConditionalGeneration(config), inputs


def _internvl() -> tuple[torch.nn.Module, Callable]:
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4], "use_qk_norm": True}
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**vision),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE_TOKEN,
        downsample_ratio=0.5,
    )
    return tf.InternVLForConditionalGeneration(config), lambda b: _decoder_batch(b, 4, {"pixel_values": _pixels(b)})


QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 32,
    "vocab_size": VOCAB,
}


def _blip2_opt() -> tuple[torch.nn.Module, Callable]:
    text = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = tf.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text,
        num_query_tokens=5,
        image_text_hidden_size=16,
        image_token_index=IMAGE_TOKEN,
    )
    return tf.Blip2ForConditionalGeneration(config), lambda b: _decoder_batch(b, 5, {"pixel_values": _pixels(b)})


def _blip2_t5() -> tuple[torch.nn.Module, Callable]:
    text = tf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    config = tf.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text,
        num_query_tokens=5,
        image_text_hidden_size=16,
        image_token_index=IMAGE_TOKEN,
    )

    def inputs(b: int) -> dict[str, torch.Tensor]:
        batch = _decoder_batch(b, 5, {"pixel_values": _pixels(b)})
        return {**batch, "labels": _text_ids(b, 4, seed=3)}

    return tf.Blip2ForConditionalGeneration(config), inputs


def _dual(model_class: type, config_class: type) -> tuple[torch.nn.Module, Callable]:
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
        ids = _text_ids(b, 8)
        ids[:, -1] = 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pixels(b)}

    return model_class(config), inputs


FACTORIES: dict[str, Callable[[], tuple[torch.nn.Module, Callable]]] = {
    "llava": lambda: _llava(tf.CLIPVisionConfig(**VISION)),
    "llava_dinov2": lambda: _llava(_dinov2(), "full"),
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": lambda: _idefics_like(tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig),
    "idefics3": lambda: _idefics_like(tf.Idefics3ForConditionalGeneration, tf.Idefics3Config),
    "paligemma": _paligemma,
    "internvl": _internvl,
    "blip2_opt": _blip2_opt,
    "blip2_t5": _blip2_t5,
    "clip": lambda: _dual(tf.CLIPModel, tf.CLIPConfig),
    "siglip": lambda: _dual(tf.SiglipModel, tf.SiglipConfig),
}


def tiny_model(name: str, attention: str = "eager") -> Tiny:
    """A seeded tiny model of the family `name`, in eval mode, fp32; norms and biases have noise: zeros hide bugs."""
    built, state = _built(name, attention)
    torch.set_rng_state(state)  # as if it had just been built
    return Tiny(copy.deepcopy(built.model), built.inputs)


@cache
def _built(name: str, attention: str) -> tuple[Tiny, torch.Tensor]:
    """The model to copy, which takes half the time, and the state in which it leaves the generator."""
    torch.manual_seed(0)
    model, inputs = FACTORIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape) * (0.5 / parameter.shape[-1] ** 0.5))
    model.set_attn_implementation(attention)
    return Tiny(model.eval(), inputs), torch.get_rng_state()


def reading(name: str, states: int | tuple[int, ...]) -> Tiny:
    """The tiny model of a family, built to read these hidden states of its three vision blocks."""
    tiny = tiny_model(name, "sdpa")
    config = tiny.model.config
    config.vision_feature_layer = states if isinstance(states, int) else list(states)
    torch.manual_seed(0)
    return Tiny(type(tiny.model)(config).eval(), tiny.inputs)
