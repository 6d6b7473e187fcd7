"""The demo architecture: a small LLaVA (CLIP tower, MLP projector, Llama with grouped queries) and its processor."""

from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from slimvlm.demo.scenes import SIDE, vocabulary

PATCH = 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{% else %}<user>{% endif %}"
    "{% if m['content'] is string %}{{ ' ' + m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; punctuation stands alone, so `fox?` and `fox ?` read the same."""
    table = {word: index for index, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    pad, bos, eos, unk, *rest = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        additional_special_tokens=rest,
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT,
    )


def build_processor() -> LlavaProcessor:
    """Works without torchvision: images are resized to SIDE and scaled to -1..1."""
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A randomly initialised model (seed torch first) of about 2.4 M parameters, with eager attention."""
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=256,
        hidden_act="gelu",
    )
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_new_tokens=8, do_sample=False, **ids)
    return model
