"""Answers token by token: the same from torch and from graphs, whole characters only, refusals in one sentence."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from exports import answer_of, cut_model, export_tiny
from plans import random_plan
from tiny_models import tiny_model
from tiny_processors import tiny_processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import open_image as pixels_of
from slimvlm.compress.errors import (
    CheckpointError,
    DeviceError,
    SampleError,
    SlimvlmError,
    UnsuitableOptionError,
    UnsupportedModelError,
)
from slimvlm.compress.evaluation.evaluate import greedy
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.export.checks.reference import generated_sample
from slimvlm.serve.chat import Text, answer, converse, open_chat, open_image

PICTURE = SAMPLES / "images" / "test-000000.webp"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A cut LLaVA as ONNX (fp32, int8) and TorchScript."""
    out = tmp_path_factory.mktemp("chat") / "export"
    return export_tiny("llava", out, formats=("onnx", "torchscript"), quantize="int8", samples=2)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """The image of the sample that an export stores, the last of the two it was checked with."""
    path = tmp_path_factory.mktemp("picture") / "generated.png"
    pixels_of(generated_sample(1, seed=0)).save(path)
    return open_image(path)


def asked(chat, image, question="what is it", most=6):
    """The pieces that were told, and the answer."""
    pieces = []
    return pieces, chat.ask(image, question, most, pieces.append)


@pytest.mark.parametrize("backend", ("onnx", "torchscript"))
def test_an_export_streams_the_answer_that_torch_gave_to_its_sample(exported, picture, backend):
    question = generated_sample(1, seed=0).turns[0].prompt
    pieces, found = asked(open_chat(str(exported.out), backend=backend), picture, question)
    assert "".join(pieces).strip() == found.text == answer_of(exported, "llava")
    assert found.tokens == 6 and len(pieces) > 1
    assert 0 < found.first_seconds <= found.seconds


def test_a_variant_is_asked_by_the_name_of_its_folder(exported, picture):
    question = generated_sample(1, seed=0).turns[0].prompt
    named, chosen = open_chat(f"{exported.out}:int8"), open_chat(str(exported.out), backend="onnx:int8")
    assert asked(named, picture, question)[1].text == asked(chosen, picture, question)[1].text
    assert named.name == f"{exported.out}:int8"
    with pytest.raises(UnsuitableOptionError, match="has no int5 graphs; it holds onnx, onnx:int8, torchscript"):
        open_chat(f"{exported.out}:int5")


@pytest.mark.parametrize("name", ("llava_next", "paligemma", "idefics3", "blip2_opt"))
def test_an_export_of_every_kind_of_prompt_answers_as_torch(tmp_path, picture, name):
    """Fixed tiles (the image is resized first), a prefix, padding masks, image tokens first."""
    result = export_tiny(name, tmp_path / "export", samples=2)
    question = generated_sample(1, seed=0).turns[0].prompt
    assert asked(open_chat(str(result.out)), picture, question)[1].text == answer_of(result, name)


@pytest.mark.parametrize("layout", ("per-layer", "stock"))
def test_a_checkpoint_streams_what_generate_gives(tmp_path, picture, layout):
    model, collator = cut_model("llava")
    plan = random_plan(tiny_model("llava").model, 1)
    if layout == "stock":
        model, plan = tiny_model("llava").model, None
    save_checkpoint(tmp_path / "model", model, tiny_processor("llava"), plan, layout)
    chat = open_chat(str(tmp_path / "model"), device="cpu")
    pieces, found = asked(chat, picture)
    batch = chat.collator.prompts([replace(picture, turns=(Turn("what is it", ("",)),))])
    ids = model.generate(**batch, generation_config=greedy(model, collator, 6))[0, batch["input_ids"].shape[1] :]
    assert "".join(pieces).strip() == found.text == collator.decode(ids[None])[0]
    assert found.tokens == len(ids)


def test_an_encoder_decoder_checkpoint_streams_what_generate_gives(tmp_path, picture):
    whole = tiny_model("blip2_t5").model
    plan = random_plan(whole, 1)
    save_checkpoint(tmp_path / "model", apply_plan(whole, plan), tiny_processor("blip2_t5"), plan)
    result = export_tiny("blip2_t5", tmp_path / "export", samples=2)
    answers = [
        asked(open_chat(str(tmp_path / folder), device="cpu"), picture)[1].text for folder in ("model", "export")
    ]
    assert answers[0] == answers[1] != ""
    assert result.manifest.generation.start == 0


def test_half_a_character_waits_for_the_rest():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    said = " ein Bär 🐻 sieht dich, 熊"
    text = Text(tokenizer)
    pieces = [text.add(token) for token in (*tokenizer(said)["input_ids"], tokenizer.eos_token_id)]
    assert text.said == "".join(pieces) == said.lstrip()
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert "🐻" in pieces
    cut_short = Text(tokenizer)
    assert [cut_short.add(token) for token in tokenizer("🐻")["input_ids"][:3]] == ["", "", ""]


def test_several_models_answer_with_their_names_and_one_without():
    chat, told, noted = open_chat(str(MODEL), device="cpu"), [], []
    image = open_image(PICTURE)
    answer([chat], image, "how many things are there ?", 8, told.append, noted.append)
    alone = "".join(told)
    assert alone.strip() and "\n" not in alone[:-1]
    told.clear()
    answer([chat, chat], image, "how many things are there ?", 8, told.append, noted.append)
    assert "".join(told) == f"{MODEL}: {alone}" * 2
    assert all("tokens, the first after" in line for line in noted)


def test_a_conversation_goes_on_until_an_empty_line_and_changes_its_image(tmp_path):
    chat, told, noted = open_chat(str(MODEL), device="cpu"), [], []
    lines = iter(
        [
            "what is at the top right ?\n",
            f"/image {tmp_path / 'none.png'}\n",
            "a question with <image> in it\n",
            f"/image {SAMPLES / 'images' / 'test-000001.webp'}\n",
            "what is at the top right ?\n",
            "\n",
            "never asked\n",
        ]
    )
    converse([chat], open_image(PICTURE), lines, 8, told.append, noted.append)
    assert "".join(told).count("\n") == 2
    assert "none.png is not a file" in noted[1]
    assert "image tokens" in noted[2]
    assert list(lines) == ["never asked\n"]


def test_an_image_that_changed_under_its_name_is_seen_anew(tmp_path):
    path = tmp_path / "image.webp"
    chat = open_chat(str(MODEL), device="cpu")
    seen = []
    for name in ("test-000000.webp", "test-000001.webp"):
        shutil.copy(SAMPLES / "images" / name, path)
        seen.append(chat.collator.prompts([open_image(path)])["pixel_values"])
    assert not seen[0].equal(seen[1])


@pytest.mark.parametrize("name", ("clip", "siglip"))
def test_a_dual_encoder_is_refused_with_the_reason(tmp_path, name):
    save_checkpoint(tmp_path / "model", tiny_model(name).model, tiny_processor(name), None)
    export_tiny(name, tmp_path / "export", samples=2)
    for folder in ("model", "export"):
        with pytest.raises(UnsupportedModelError, match=f"{folder} is a dual encoder .* answers nothing"):
            open_chat(str(tmp_path / folder), device="cpu")


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for path, says in ((tmp_path / "none.png", "is not a file"), (tmp_path / "text.png", "is not an image")):
        with pytest.raises(SampleError, match=says):
            open_image(path)


def test_what_is_no_model_is_refused(tmp_path, exported):
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(exported.out, tmp_path / "damaged")
    graph = damaged / "onnx" / "embed_tokens.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    refused = (
        (tmp_path / "empty", {}, CheckpointError, "neither a checkpoint .* nor an export"),
        (tmp_path / "none", {}, CheckpointError, "is not a folder"),
        (damaged, {}, CheckpointError, "embed_tokens.onnx was changed"),
        (exported.out, {"backend": "pt2"}, UnsuitableOptionError, "holds onnx, onnx:int8, torchscript"),
        (exported.out, {"device": "cuda"}, DeviceError, "CUDAExecutionProvider"),
        (exported.out, {"device": "cuda", "backend": "torchscript"}, DeviceError, "use --device cpu"),
        (MODEL, {"backend": "onnx"}, UnsuitableOptionError, "is a checkpoint"),
    )
    for folder, options, kind, says in refused:
        with pytest.raises(kind, match=says) as caught:
            asked(open_chat(str(folder), **options), open_image(PICTURE))
        assert isinstance(caught.value, SlimvlmError) and caught.value.exit_code == 3
        assert "\n" not in str(caught.value)
