from pathlib import Path

import pytest
import torch
from tiny_models import FACTORIES, IMAGE_TOKEN, tiny_model
from tiny_processors import SQUARE, tiny_image, tiny_processor, tiny_tokenizer
from transformers import CLIPImageProcessor, LlavaProcessor

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample, open_image, split_caption
from slimvlm.compress.errors import MissingDependencyError, SampleError, UnsupportedModelError
from slimvlm.compress.models.families import find_family

DUAL = ("clip", "siglip")
GENERATIVE = tuple(name for name in FACTORIES if name not in DUAL)
DECODERS = tuple(name for name in GENERATIVE if name != "blip2_t5")
TEMPLATED = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "idefics3", "internvl")
QUESTIONS = (("what is on the left ?", "a red fox"), ("how many ?", "two"), ("", "a small blue house and a tree"))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    made = []
    for index, (question, answer) in enumerate(QUESTIONS):
        path = tmp_path / f"{index}.png"
        tiny_image(24 if index else 40, 20, seed=index).save(path)
        made.append(Sample(path, (Turn(question, (answer,)),), f"set:{index}"))
    return made


def collator_of(name: str) -> tuple[torch.nn.Module, Collator]:
    model = tiny_model(name).model
    return model, Collator(tiny_processor(name), find_family(model.config), model.config)


def words(collator: Collator, ids: torch.Tensor) -> str:
    return collator.tokenizer.decode(ids[ids >= 0])


@pytest.mark.parametrize("name", TEMPLATED)
def test_prompt_and_answer_are_what_the_chat_template_of_the_processor_writes(name: str, samples: list[Sample]) -> None:
    _, collator = collator_of(name)
    batch = collator.training(samples)
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0][0]}]
    answer = [{"type": "text", "text": QUESTIONS[0][1]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    text = collator.processor.apply_chat_template(messages, tokenize=False)
    expected = collator.processor(
        images=[open_image(samples[0])], text=[text], add_special_tokens=False, return_tensors="pt"
    )
    length = expected["input_ids"].shape[1]
    assert batch["input_ids"][0][:length].tolist() == expected["input_ids"][0].tolist()
    assert batch["attention_mask"].sum(1)[0] == length
    assert words(collator, batch["labels"][0]) == "a red fox </s>"


@pytest.mark.parametrize("name", DECODERS)
def test_labels_are_the_answer_and_its_end_aligned_with_input_ids(name: str, samples: list[Sample]) -> None:
    _, collator = collator_of(name)
    batch = collator.training(samples)
    supervised = batch["labels"] != -100
    assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])
    for row, (_, answer) in enumerate(QUESTIONS):
        assert words(collator, batch["labels"][row]) == f"{answer} </s>"
    assert not (batch["input_ids"][supervised] == IMAGE_TOKEN).any()


@pytest.mark.parametrize("name", GENERATIVE)
def test_every_family_takes_the_training_batch_and_gives_a_finite_loss(name: str, samples: list[Sample]) -> None:
    model, collator = collator_of(name)
    batch = collator.training(samples)
    with torch.inference_mode():
        loss = model(**batch).loss
    assert torch.isfinite(loss)
    assert (batch["input_ids"] == collator.image_token_id).any()


@pytest.mark.parametrize("name", GENERATIVE)
def test_prompts_are_left_padded_and_generate(name: str, samples: list[Sample]) -> None:
    model, collator = collator_of(name)
    batch = collator.prompts(samples)
    assert batch["attention_mask"][:, -1].all()
    assert "labels" not in batch
    ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert len(collator.decode(ids)) == len(samples)


@pytest.mark.parametrize("name", DECODERS)
def test_a_prompt_is_the_beginning_of_its_training_sequence(name: str, samples: list[Sample]) -> None:
    _, collator = collator_of(name)
    full, prompt = collator.training(samples), collator.prompts(samples)
    for row in range(len(samples)):
        start = int((full["labels"][row] != -100).nonzero()[0])
        asked = prompt["input_ids"][row][prompt["attention_mask"][row].bool()]
        assert full["input_ids"][row][:start].tolist() == asked.tolist()


@pytest.mark.parametrize("name", GENERATIVE)
def test_a_sample_gives_the_same_logits_alone_and_in_a_batch(name: str, samples: list[Sample]) -> None:
    model, collator = collator_of(name)
    together, alone = collator.training(samples), collator.training(samples[1:2])
    with torch.inference_mode():
        many, one = model(**together).logits[1], model(**alone).logits[0]
    shown = one.shape[0]
    assert torch.allclose(many[:shown], one, atol=1e-4)


def test_encoder_decoder_targets_are_the_answer_alone(samples: list[Sample]) -> None:
    _, collator = collator_of("blip2_t5")
    batch = collator.training(samples)
    assert [words(collator, row) for row in batch["labels"]] == [f"{answer} </s>" for _, answer in QUESTIONS]
    shown = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert words(collator, shown[5:]) == "what is on the left ? </s>"
    assert (shown[:5] == IMAGE_TOKEN).all()


def test_paligemma_gets_what_its_processor_gives_for_prefix_and_suffix(samples: list[Sample]) -> None:
    _, collator = collator_of("paligemma")
    batch = collator.training(samples[:2])
    expected = collator.processor(
        images=[open_image(sample) for sample in samples[:2]],
        text=[f"<image>{sample.turns[0].prompt}" for sample in samples[:2]],
        suffix=[sample.turns[0].target for sample in samples[:2]],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    for key in ("input_ids", "attention_mask", "token_type_ids", "labels", "pixel_values"):
        assert torch.equal(batch[key], expected[key]), key


def test_blip2_gets_what_its_processor_gives_for_the_prompt(samples: list[Sample]) -> None:
    _, collator = collator_of("blip2_opt")
    batch = collator.prompts(samples)
    expected = collator.processor(
        images=[open_image(sample) for sample in samples], text=[question for question, _ in QUESTIONS]
    )
    for row, ids in enumerate(expected["input_ids"]):
        assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == ids


def test_qwen_gets_a_token_type_for_image_positions_only(samples: list[Sample]) -> None:
    _, collator = collator_of("qwen2_vl")
    for batch in (collator.training(samples), collator.prompts(samples)):
        assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == IMAGE_TOKEN)
    assert batch["image_grid_thw"].shape == (len(samples), 3)
    assert (batch["input_ids"] == collator.image_token_id).sum() == int(batch["image_grid_thw"].prod(1).sum()) // 4


def test_images_of_several_tiles_are_padded_to_the_largest(samples: list[Sample]) -> None:
    _, collator = collator_of("llava_next")
    wide = samples[0]
    square = Sample(samples[1].image.with_name("square.png"), samples[1].turns, "square")
    tiny_image(16, 16).save(square.image)
    batch = collator.training([square, wide])
    tiles = [collator.training([sample])["pixel_values"].shape[1] for sample in (square, wide)]
    assert tiles[0] < tiles[1] == batch["pixel_values"].shape[1]
    assert not batch["pixel_values"][0, tiles[0] :].any()


def test_clip_texts_are_padded_with_a_mask_and_siglip_texts_to_full_length(samples: list[Sample]) -> None:
    _, clip = collator_of("clip")
    model, siglip = collator_of("siglip")
    batch = clip.training(samples)
    assert words(clip, batch["input_ids"][1][batch["attention_mask"][1].bool()]) == "<s> how many ? two </s>"
    full = siglip.training(samples)
    assert "attention_mask" not in full
    assert full["input_ids"].shape == (len(samples), model.config.text_config.max_position_embeddings)


@pytest.mark.parametrize("name", DUAL)
def test_dual_encoders_take_the_training_batch_and_give_a_contrastive_loss(name: str, samples: list[Sample]) -> None:
    model, collator = collator_of(name)
    with torch.inference_mode():
        assert torch.isfinite(model(**collator.training(samples)).loss)
    with pytest.raises(ValueError, match="does not generate"):
        collator.prompts(samples)


def conversation(samples: list[Sample]) -> Sample:
    turns = (Turn("what is it ?", ("a cat",)), Turn("where ?", ("on the right",)))
    return Sample(samples[0].image, turns, "chat:0")


def test_all_answers_of_a_conversation_are_supervised_or_only_the_last(samples: list[Sample]) -> None:
    _, collator = collator_of("llava")
    batch = collator.training([conversation(samples)])
    assert words(collator, batch["labels"][0]) == "a cat </s> on the right </s>"
    last = collator.training([conversation(samples)], last_turn=True)
    assert words(collator, last["labels"][0]) == "on the right </s>"
    assert torch.equal(batch["input_ids"], last["input_ids"])
    assert words(collator, collator.prompts([conversation(samples)])["input_ids"][0]).endswith("where ? assistant:")


def test_a_conversation_is_refused_where_the_processor_takes_one_question(samples: list[Sample]) -> None:
    _, collator = collator_of("paligemma")
    with pytest.raises(SampleError, match="chat:0.*one question per sample"):
        collator.training([conversation(samples)])


def test_a_template_without_an_end_token_gets_one_and_it_is_supervised(samples: list[Sample]) -> None:
    _, collator = collator_of("llava")
    template = collator.processor.chat_template.replace("{{ eos_token }}", "")
    collator.processor.chat_template = collator._template = template
    assert words(collator, collator.training(samples)["labels"][1]) == "two </s>"


def test_a_template_that_opens_answers_differently_is_refused(samples: list[Sample]) -> None:
    _, collator = collator_of("llava")
    collator.processor.chat_template = collator.processor.chat_template.replace("%}assistant:{%", "%}now answer{%")
    with pytest.raises(UnsupportedModelError, match="generation prompt"):
        collator.training(samples)


def test_a_processor_without_template_gets_its_image_token_a_newline_and_the_question(samples: list[Sample]) -> None:
    model = tiny_model("llava").model
    images = CLIPImageProcessor(size=SQUARE, crop_size=SQUARE)
    processor = LlavaProcessor(
        images,
        tiny_tokenizer("<s> $0"),
        patch_size=4,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    collator = Collator(processor, find_family(model.config), model.config)
    batch = collator.training(samples)
    text = "<s> " + "<image> " * 16 + "what is on the left ? a red fox </s>"
    assert words(collator, batch["input_ids"][0][batch["attention_mask"][0].bool()]) == text
    assert words(collator, batch["labels"][0]) == "a red fox </s>"


def test_captions_are_split_the_same_way_whatever_the_batch(samples: list[Sample]) -> None:
    _, collator = collator_of("blip2_t5")
    split = [split_caption(sample, seed=3) for sample in samples]
    together, alone = collator.training(split), collator.training(split[2:])
    targets = [words(collator, row) for row in together["labels"]]
    assert targets[2] == words(collator, alone["labels"][0])
    given = together["input_ids"][2][together["attention_mask"][2].bool()][5:-1]
    assert f"{words(collator, given)} {targets[2]}" == f"{QUESTIONS[2][1]} </s>"
    assert targets[0] == "a red fox </s>"


@pytest.mark.parametrize("name", ["llava", "blip2_t5", "clip"])
def test_a_text_longer_than_the_model_takes_is_an_error_that_names_the_sample(name: str, samples: list[Sample]) -> None:
    _, collator = collator_of(name)
    collator.max_text_tokens = 30 if name != "clip" else 10
    long = Sample(samples[0].image, (Turn("red " * 40, ("fox",)),), "set:7")
    with pytest.raises(SampleError, match=r"set:7: \d+ tokens.*at most"):
        collator.training([samples[1], long])
    _, default = collator_of("llava")
    assert default.max_text_tokens == 256


def test_an_image_token_in_the_text_is_an_error_that_names_the_sample(samples: list[Sample]) -> None:
    _, collator = collator_of("llava")
    doubled = Sample(samples[0].image, (Turn("what is <image> ?", ("fox",)),), "set:8")
    with pytest.raises(SampleError, match="set:8.*2 image tokens"):
        collator.training([doubled])


def test_an_image_is_processed_once_for_all_its_questions(samples: list[Sample]) -> None:
    _, collator = collator_of("llava")
    first = collator.training(samples[:1])["pixel_values"]
    samples[0].image.unlink()
    again = collator.prompts([Sample(samples[0].image, (Turn("how many ?", ("one",)),), "set:9")])["pixel_values"]
    assert torch.equal(first, again)


def test_a_missing_processor_says_what_to_install() -> None:
    model = tiny_model("qwen2_vl").model
    with pytest.raises(MissingDependencyError, match=r"slimvlm\[vision\]"):
        Collator(None, find_family(model.config), model.config)


def test_a_bare_tokenizer_is_not_a_processor() -> None:
    model = tiny_model("llava").model
    with pytest.raises(UnsupportedModelError, match="image processor"):
        Collator(tiny_tokenizer(), find_family(model.config), model.config)
