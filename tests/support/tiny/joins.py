"""A tiny model of every family that takes any tower and any text model, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import transformers as tf
from tiny.sizes import IMAGE_TOKEN, decoder_batch, pixels
from tiny.texts import TEXTS
from tiny.towers import BEFORE, TOWERS

Inputs = Callable[[int], dict[str, torch.Tensor]]
Built = tuple[torch.nn.Module, Inputs]
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


def _llava(tower: str, text: str, strategy: str = "default") -> Built:
    config = tf.LlavaConfig(
        **_parts(tower, text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-2,
    )
    tokens = 16 + BEFORE.get(tower, 0) - (strategy == "default")
    return tf.LlavaForConditionalGeneration(config), partial(one_image, tokens=tokens)


def _llava_next(tower: str, text: str) -> Built:
    config = tf.LlavaNextConfig(**_parts(tower, text), image_token_index=IMAGE_TOKEN, image_grid_pinpoints=PINPOINTS)
    return tf.LlavaNextForConditionalGeneration(config), _tiled


def _llava_onevision(tower: str, text: str) -> Built:
    config = tf.LlavaOnevisionConfig(
        **_parts(tower, text),
        image_token_index=IMAGE_TOKEN,
        video_token_index=IMAGE_TOKEN + 1,
        image_grid_pinpoints=PINPOINTS,
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
        vision_feature_select_strategy="default" if tower in BEFORE else "full",
    )
    return tf.InternVLForConditionalGeneration(config), partial(one_image, tokens=4)


JOINS: dict[str, Callable[[str, str], Built]] = {
    "llava": lambda tower, text: _llava(tower, text, "default" if tower == "clip_vision_model" else "full"),
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "internvl": _internvl,
}
