"""Real processors for the tiny models of tiny_models.py: word-level tokenizer of its 96 ids, 16-pixel images.

Some processors refuse to be built without torchvision, which only their video part needs; `still` builds the same
class without that part.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import transformers as tf
from PIL import Image
from tiny import joins
from tiny.towers import BEFORE
from tiny_models import IMAGE_TOKEN, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

TEXT = (
    "a the what is it red blue green fox cat dog bird where how many two three one on left right of and grey with "
    "house tree small large describe image yes no color user: assistant: question: answer: . ? ,"
)
SPECIAL = {
    0: "<pad>",
    1: "<s>",
    2: "</s>",
    3: "<unk>",
    84: "<row_1_col_1>",
    85: "<fake_token_around_image>",
    86: "<global-img>",
    87: "<end_of_utterance>",
    IMAGE_TOKEN: "<image>",
    IMAGE_TOKEN + 1: "<video>",
    IMAGE_TOKEN + 2: "<|vision_start|>",
    IMAGE_TOKEN + 3: "<|vision_end|>",
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SQUARE = {"height": 16, "width": 16}
EDGES = {"boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>"}
PINPOINTS = [[16, 16], [16, 32], [32, 16]]


def tiny_tokenizer(pattern: str = "", **kwargs: str) -> tf.PreTrainedTokenizerFast:
    """Words apart by blanks; `pattern` says what is added around a text, such as `<s> $0`."""
    words = iter(TEXT.split())
    table = {SPECIAL.get(index) or next(words, f"w{index}"): index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pattern:
        ends = [(token, table[token]) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=ends)
    extra = [token for index, token in SPECIAL.items() if index > 3]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=extra,
        **kwargs,
    )


def tiny_image(width: int = 24, height: int = 20, seed: int = 0) -> Image.Image:
    """Coloured noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def still(processor_class: type, *args: object, **kwargs: object) -> tf.ProcessorMixin:
    """A processor without its video part."""

    class Still(processor_class):
        def check_argument_for_proper_class(self, name: str, argument: object) -> object:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    Still.__name__ = processor_class.__name__
    return Still(*args, **kwargs)


def _llava(tower: str) -> tf.ProcessorMixin:
    if tower == "pixtral":
        return _pixtral(1)
    strategy = joins.strategy_of(tower, joins.CLASSED)
    return _counted(tf.LlavaProcessor, CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), tower, strategy)


def _counted(processor_class: type, images: object, tower: str, strategy: str) -> tf.ProcessorMixin:
    """It counts the tokens of an image as the model selects them."""
    tokens = {"num_additional_image_tokens": BEFORE.get(tower, 0), "vision_feature_select_strategy": strategy}
    return processor_class(images, tiny_tokenizer(), patch_size=4, **tokens, chat_template=CHAT)


def _llava_next(tower: str) -> tf.ProcessorMixin:
    size = {"shortest_edge": 16}
    images = LlavaNextImageProcessorPil(size=size, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    return _counted(tf.LlavaNextProcessor, images, tower, joins.strategy_of(tower))


def _pixtral(merged: int) -> tf.ProcessorMixin:
    """Its own, which writes the ends of rows too, needs torchvision."""
    images = PixtralImageProcessorPil(size=SQUARE, patch_size=4)
    tokens = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    return tf.LlavaProcessor(images, tiny_tokenizer(), patch_size=4 * merged, **tokens, chat_template=CHAT)


def _aya() -> tf.ProcessorMixin:
    names = {"start_of_img_token": "<|vision_start|>", "end_of_img_token": "<|vision_end|>"}
    return tf.AyaVisionProcessor(
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False),
        tiny_tokenizer(),
        patch_size=4,
        img_size=16,
        downsample_factor=2,
        image_token="<video>",  # what stands in a text; what stands for a feature is another one
        img_patch_token="<image>",
        tile_global_token="<global-img>",
        chat_template=CHAT.replace("<image>", "<video>"),
        **names,
    )


def _cohere2() -> tf.ProcessorMixin:
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False)  # its own needs torchvision
    images.patch_size = 2
    names = {"image_token": "<image>", "img_line_break_token": "<row_1_col_1>"}
    return tf.Cohere2VisionProcessor(images, _named({**names, **EDGES}), chat_template=CHAT)


def _gemma3() -> tf.ProcessorMixin:
    """Its texts hold a token at which an image starts, and its prompts that one, those of the features, and an end."""
    tokenizer = _named({"image_token": "<image>", **EDGES})
    template = CHAT.replace("<image>", EDGES["boi_token"])
    return tf.Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE), tokenizer, chat_template=template, image_seq_length=4
    )


def _idefics2() -> tf.ProcessorMixin:
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 16}, do_image_splitting=False)
    return tf.Idefics2Processor(images, tiny_tokenizer(), image_seq_len=3, chat_template=CHAT)


def _named(tokens: dict[str, str], pattern: str = "") -> tf.PreTrainedTokenizerFast:
    """A tokenizer that knows the names of its vision tokens, as those on the hub do."""
    tokenizer = tiny_tokenizer(pattern)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def _idefics3() -> tf.ProcessorMixin:
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    return tf.Idefics3Processor(images, tiny_tokenizer(), image_seq_len=4, chat_template=CHAT)


def _qwen() -> tf.ProcessorMixin:
    images = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 256, "longest_edge": 1024}
    )
    tokenizer = _named({"image_token": "<image>", "video_token": "<video>"})
    template = CHAT.replace("<image>", "<|vision_start|><image><|vision_end|>")
    return still(tf.Qwen2VLProcessor, images, tokenizer, None, chat_template=template)


def _internvl() -> tf.ProcessorMixin:
    names = {
        "start_image_token": "<|vision_start|>",
        "end_image_token": "<|vision_end|>",
        "context_image_token": "<image>",
        "video_token": "<video>",
    }
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False)
    return still(tf.InternVLProcessor, images, _named(names), None, image_seq_length=4, chat_template=CHAT)


def _onevision(tower: str) -> tf.ProcessorMixin:
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    tokens = 16 + BEFORE.get(tower, 0)
    strategy = {
        "num_image_tokens": tokens,
        "vision_feature_select_strategy": joins.strategy_of(tower),
        "chat_template": CHAT,
    }
    return still(tf.LlavaOnevisionProcessor, images, tiny_tokenizer(), None, **strategy)


def _paligemma() -> tf.ProcessorMixin:
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    return tf.PaliGemmaProcessor(images, tiny_tokenizer())


def _blip2(pattern: str) -> tf.ProcessorMixin:
    return tf.Blip2Processor(BlipImageProcessorPil(size=SQUARE), tiny_tokenizer(pattern), num_query_tokens=5)


def _siglip() -> tf.ProcessorMixin:
    tokenizer = tiny_tokenizer("$0 </s>", model_input_names=["input_ids"])
    return tf.SiglipProcessor(SiglipImageProcessorPil(size=SQUARE), tokenizer)


PROCESSORS: dict[str, Callable[[], tf.ProcessorMixin]] = {
    "llava": lambda: _llava("clip_vision_model"),
    "llava_dinov2": lambda: _llava("dinov2"),
    "llava_next": lambda: _llava_next("clip_vision_model"),
    "llava_onevision": lambda: _onevision("siglip_vision_model"),
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,  # its own needs the package num2words; the tokens of a still image are the same
    "paligemma": _paligemma,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "blip2_opt": lambda: _blip2("<s> $0"),
    "blip2_t5": lambda: _blip2("$0 </s>"),
    "clip": lambda: tf.CLIPProcessor(
        CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), tiny_tokenizer("<s> $0 </s>")
    ),
    "siglip": _siglip,
}


JOINED: dict[str, Callable[[str], tf.ProcessorMixin]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _onevision,
    "paligemma": lambda _: _paligemma(),
    "internvl": lambda _: _internvl(),
    "vipllava": lambda tower: _counted(
        tf.LlavaProcessor, CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE), tower, "default"
    ),
    "aya_vision": lambda _: _aya(),
    "cohere2_vision": lambda _: _cohere2(),
    "gemma3": lambda _: _gemma3(),
    "mistral3": lambda _: _pixtral(2),
    "idefics2": lambda _: _idefics2(),
    "idefics3": lambda _: _idefics3(),
    "smolvlm": lambda _: _idefics3(),
}


def tiny_processor(name: str) -> tf.ProcessorMixin:
    """A new processor of a family."""
    if name in PROCESSORS:
        return PROCESSORS[name]()
    model_type, tower, _ = joins.COVERING[name]
    return JOINED[model_type](tower)
