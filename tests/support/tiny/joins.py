"""A tiny model of every family that takes any tower and any text model, and batches for it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
import transformers as tf
from tiny.sizes import IMAGE_TOKEN, VISION, decoder_batch, pixels
from tiny.texts import TEXTS
from tiny.towers import BEFORE, TOWERS

from slimvlm.compress.models.families import compose

Inputs = Callable[[int], dict[str, torch.Tensor]]
Built = tuple[torch.nn.Module, Inputs]
CLASSED = ("clip_vision_model", "mlcd_vision_model")  # LLaVA leaves out the first token of these
PINPOINTS = [[16, 16], [16, 32], [32, 16]]


def one_image(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """An image each, which `tokens` tokens stand for."""
    return decoder_batch(batch, tokens, {"pixel_values": pixels(batch)})


def _tiled(batch: int) -> dict[str, torch.Tensor]:
    """An image and its one tile each; the tile's 16 features are followed by newlines."""
    both = torch.stack([pixels(batch), pixels(batch, seed=2)], dim=1)
    sizes = torch.tensor([[16, 16]] * batch)
    return decoder_batch(batch, 16 + 20, {"pixel_values": both, "image_sizes": sizes})


def _parts(tower: str, text: str) -> dict[str, tf.PreTrainedConfig]:
    return {"vision_config": TOWERS[tower](), "text_config": TEXTS[text]()}


def strategy_of(tower: str, classed: Collection[str] = tuple(BEFORE)) -> str:
    """Whether the first token of a tower is left out of the features."""
    return "default" if tower in classed else "full"


def _llava(tower: str, text: str) -> Built:
    strategy = strategy_of(tower, CLASSED)
    config = tf.LlavaConfig(
        **_parts(tower, text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    tokens = 16 + BEFORE.get(tower, 0) - (strategy == "default")
    batch_of = _sized if tower == "pixtral" else one_image
    return tf.LlavaForConditionalGeneration(config), partial(batch_of, tokens=tokens)


def _llava_next(tower: str, text: str) -> Built:
    config = tf.LlavaNextConfig(
        **_parts(tower, text),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy=strategy_of(tower),
    )
    return tf.LlavaNextForConditionalGeneration(config), _tiled


def _llava_onevision(tower: str, text: str) -> Built:
    config = tf.LlavaOnevisionConfig(
        **_parts(tower, text),
        image_token_index=IMAGE_TOKEN,
        video_token_index=IMAGE_TOKEN + 1,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy=strategy_of(tower),
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), _tiled


def _paligemma(tower: str, text: str) -> Built:
    parts = _parts(tower, text)
    parts["vision_config"].projection_dim = 32
    config = tf.PaliGemmaConfig(**parts, image_token_index=IMAGE_TOKEN, projection_dim=32, hidden_size=32)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        made = one_image(batch, 16 + BEFORE.get(tower, 0))
        return {**made, "token_type_ids": torch.zeros_like(made["input_ids"])}

    return tf.PaliGemmaForConditionalGeneration(config), inputs


def _internvl(tower: str, text: str) -> Built:
    config = tf.InternVLConfig(
        **_parts(tower, text),
        image_token_id=IMAGE_TOKEN,
        downsample_ratio=0.5,
        vision_feature_select_strategy=strategy_of(tower),
    )
    return tf.InternVLForConditionalGeneration(config), partial(one_image, tokens=4)


def _vipllava(tower: str, text: str) -> Built:
    config = tf.VipLlavaConfig(**_parts(tower, text), image_token_index=IMAGE_TOKEN, vision_feature_layer=[-2, 1])
    return tf.VipLlavaForConditionalGeneration(config), partial(one_image, tokens=15 + BEFORE.get(tower, 0))


def _shuffled(model_class: type, config_class: type, tower: str, text: str) -> Built:
    sizes = {"downsample_factor": 2, "alignment_intermediate_size": 16, "image_token_id": IMAGE_TOKEN}
    config = config_class(**_parts(tower, text), **sizes)
    return model_class(config), partial(one_image, tokens=4)


def _gemma3(tower: str, text: str) -> Built:
    config = tf.Gemma3Config(**_parts(tower, text), mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        made = one_image(batch, 4)
        return {**made, "token_type_ids": (made["input_ids"] == IMAGE_TOKEN).long()}

    return tf.Gemma3ForConditionalGeneration(config), inputs


def _sized(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    return {**one_image(batch, tokens), "image_sizes": torch.tensor([[16, 16]] * batch)}


def _mistral3(tower: str, text: str) -> Built:
    config = tf.Mistral3Config(**_parts(tower, text), image_token_index=IMAGE_TOKEN, spatial_merge_size=2)
    return tf.Mistral3ForConditionalGeneration(config), partial(_sized, tokens=4)


def _idefics2(tower: str, text: str) -> Built:
    perceiver = {"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 2}
    config = tf.Idefics2Config(
        vision_config=VISION,
        text_config=TEXTS[text](),
        perceiver_config=perceiver,
        image_token_id=IMAGE_TOKEN,
    )
    return tf.Idefics2ForConditionalGeneration(config), partial(_listed, tokens=3)


def _listed(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    made = one_image(batch, tokens)
    return {**made, "pixel_values": made["pixel_values"][:, None]}


def _idefics3(model_class: type, config_class: type, text: str) -> Built:
    config = config_class(
        vision_config=VISION,
        text_config=TEXTS[text](),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
        pad_token_id=0,
    )
    return model_class(config), partial(_listed, tokens=4)


JOINS: dict[str, Callable[[str, str], Built]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "internvl": _internvl,
    "vipllava": _vipllava,
    "aya_vision": partial(_shuffled, tf.AyaVisionForConditionalGeneration, tf.AyaVisionConfig),
    "cohere2_vision": partial(_shuffled, tf.Cohere2VisionForConditionalGeneration, tf.Cohere2VisionConfig),
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "idefics2": _idefics2,
    "idefics3": lambda _, text: _idefics3(tf.Idefics3ForConditionalGeneration, tf.Idefics3Config, text),
    "smolvlm": lambda _, text: _idefics3(tf.SmolVLMForConditionalGeneration, tf.SmolVLMConfig, text),
}

COVERING: dict[str, tuple[str, str, str]] = {
    compose(*row).name: row
    for row in (
        ("vipllava", "clip_vision_model", "llama"),
        ("aya_vision", "siglip_vision_model", "cohere2"),
        ("cohere2_vision", "siglip_vision_model", "cohere2"),
        ("gemma3", "siglip_vision_model", "gemma3_text"),
        ("mistral3", "pixtral", "mistral"),
        ("idefics2", "idefics2_vision", "mistral"),
        ("mistral3", "pixtral", "ministral3"),
        ("paligemma", "siglip_vision_model", "gemma2"),
        ("llava", "pixtral", "mistral"),
        ("llava", "dinov2_with_registers", "qwen3"),
        ("llava", "mlcd_vision_model", "ernie4_5"),
        ("llava", "aimv2_vision_model", "olmo2"),
        ("llava", "siglip_vision_model", "phi"),
        ("llava", "internvl_vision", "nemotron"),
        ("llava", "clip_vision_model", "starcoder2"),
        ("llava_next", "siglip_vision_model", "granite"),
        ("llava_next", "clip_vision_model", "hunyuan_v1_dense"),
        ("llava_onevision", "dinov2", "exaone4"),
        ("vipllava", "clip_vision_model", "seed_oss"),
        ("aya_vision", "siglip_vision_model", "cohere"),
        ("internvl", "internvl_vision", "helium"),
        ("internvl", "internvl_vision", "arcee"),
        ("idefics2", "idefics2_vision", "olmo3"),
        ("idefics3", "idefics3_vision", "olmo"),
        ("smolvlm", "smolvlm_vision", "smollm3"),
    )
}
"""Pairs with every tower and every text model that a family of JOINS takes, and every such family."""


def tiny_pair(model_type: str, tower: str, text: str) -> Built:
    """A model of a family, a tower and a text model, and its batches."""
    return JOINS[model_type](tower, text)
