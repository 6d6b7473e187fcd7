"""Real models by their configs: what `benchmarks/scale.py` makes with random weights, one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from real_shapes.processing_still import StillQwenProcessor
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Processor,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    SmolVLMConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WORDS = "<pad> <s> </s> <unk> <image> <video> <|vision_start|> <|vision_end|> <fake_token_around_image> <global-img>"
SPECIAL = tuple(WORDS.split())
TEXT = ("user:", "assistant:", *(f"word{number}" for number in range(86)))
IDS = {word: number for number, word in enumerate((*SPECIAL, *TEXT))}
CHAT = (
    "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %} IMAGE{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A model: its config, a processor of some words, the side in pixels of the images it is shown, its name, and the
    share of its parameters that is removed.
    """

    config: Callable[[], PreTrainedConfig]
    processor: Callable[[], ProcessorMixin]
    side: int
    says: str
    ratio: float = 0.5


def _tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """Words apart by blanks; the tokens in `names` are known by these names."""
    words = Tokenizer(models.WordLevel(dict(IDS), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
        extra_special_tokens=names,
    )


def _smolvlm() -> PreTrainedConfig:
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    }
    text = LlamaConfig(
        vocab_size=49280,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        pad_token_id=IDS["<pad>"],
    )
    rest: dict[str, Any] = {"image_token_id": IDS["<image>"], "scale_factor": 4, "pad_token_id": IDS["<pad>"]}
    return SmolVLMConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **rest)


def _idefics3() -> ProcessorMixin:
    side = {"longest_edge": 512}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    return Idefics3Processor(images, _tokenizer(), image_seq_len=64, chat_template=CHAT.replace("IMAGE", "<image>"))


def _qwen() -> ProcessorMixin:
    images = Qwen2VLImageProcessorPil(
        patch_size=14, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 56**2, "longest_edge": 448**2}
    )
    tokenizer = _tokenizer(image_token="<image>", video_token="<video>")
    template = CHAT.replace("IMAGE", "<|vision_start|><image><|vision_end|>")
    return StillQwenProcessor(images, tokenizer, chat_template=template)


def _qwen_config(
    kind: Callable[..., PreTrainedConfig], text: dict[str, Any], vision: dict[str, Any]
) -> PreTrainedConfig:
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    tied = text.pop("tie_word_embeddings", False)
    ids = {
        "image_token_id": IDS["<image>"],
        "video_token_id": IDS["<video>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
    }
    ends = {"pad_token_id": IDS["<pad>"], "bos_token_id": IDS["<s>"], "eos_token_id": IDS["</s>"]}
    text = {**text, **ends, "rope_parameters": rope, "max_position_embeddings": 32768}
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


def _qwen2_2b() -> PreTrainedConfig:
    text = {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536, "patch_size": 14}
    return _qwen_config(Qwen2VLConfig, text, vision)


def _vision(out: int, **sizes: Any) -> dict[str, Any]:
    return {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": out,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        **sizes,
    }


def _qwen25_3b() -> PreTrainedConfig:
    text = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return _qwen_config(Qwen2_5_VLConfig, text, _vision(2048))


def _qwen25_7b() -> PreTrainedConfig:
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    return _qwen_config(Qwen2_5_VLConfig, text, _vision(3584))


def _qwen25_72b(blocks: int = 2, vision_blocks: int = 2) -> PreTrainedConfig:
    """By default two blocks of 80, and two of the vision tower's 32: one attends within windows, one does not."""
    text = {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": blocks,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
    whole = [block for block in (7, 15, 23, 31) if block < vision_blocks] or [vision_blocks - 1]
    vision = _vision(8192, depth=vision_blocks, intermediate_size=3456, fullatt_block_indexes=whole)
    return _qwen_config(Qwen2_5_VLConfig, text, vision)


SHAPES = {
    "smolvlm-256m": Shape(_smolvlm, _idefics3, 512, "SmolVLM-256M"),
    "qwen2-vl-2b": Shape(_qwen2_2b, _qwen, 112, "Qwen2-VL-2B"),
    "qwen2.5-vl-3b": Shape(_qwen25_3b, _qwen, 112, "Qwen2.5-VL-3B"),
    "qwen2.5-vl-7b": Shape(_qwen25_7b, _qwen, 112, "Qwen2.5-VL-7B"),
    "qwen2.5-vl-72b": Shape(
        _qwen25_72b,
        _qwen,
        112,
        "Qwen2.5-VL-72B, two of 80 text blocks and two of 32 vision blocks",
        ratio=0.2,  # half of its blocks: embeddings and head are most of the rest
    ),
}
WHOLE: dict[str, Callable[[], PreTrainedConfig]] = {  # whose cost is told, with all their blocks
    "SmolVLM-256M": _smolvlm,
    "Qwen2-VL-2B": _qwen2_2b,
    "Qwen2.5-VL-7B": _qwen25_7b,
    "Qwen2.5-VL-72B": partial(_qwen25_72b, 80, 32),
}
DTYPE = torch.bfloat16
