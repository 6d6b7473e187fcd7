"""Packed training rows compute what separate questions would."""

import itertools
import random

import pytest
import torch
from PIL import Image

from slimvlm.demo.model import build_model, build_processor
from slimvlm.demo.packing import IGNORE, answer_logits, exact_matches, pack, patch_words
from slimvlm.demo.scenes import SIDE, Scene, questions
from slimvlm.demo.train import Recipe, choose, schedule


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer).eval()
    scenes = [
        Scene("noto", ("fox", "apple", None, "violin"), ("red", "blue", "green", "white")),
        Scene("noto", ("bus", None, None, None), ("grey", "blue", "green", "white")),
    ]
    noise = torch.randint(0, 256, (2, SIDE, SIDE, 3), dtype=torch.uint8).numpy()
    images = [Image.fromarray(pixels) for pixels in noise]
    asked = [questions(random.Random(index), scene) for index, scene in enumerate(scenes)]
    return model, processor, images, asked


@torch.no_grad()
def test_packed_logits_equal_separate_forward_passes_through_the_processor(parts):
    model, processor, images, asked = parts
    packed, labels = answer_logits(model, pack(images, asked, processor.tokenizer))
    start = 0
    for image, questions_of_image in zip(images, asked, strict=True):
        for question in questions_of_image:
            turns = [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
                {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
            ]
            inputs = processor(images=[image], text=processor.apply_chat_template(turns), return_tensors="pt")
            count = len(question.answer.split()) + 1
            assert inputs["input_ids"][0, -count:].tolist() == labels[start : start + count].tolist()
            alone = model(**inputs).logits[0, -count - 1 : -1]
            torch.testing.assert_close(packed[start : start + count], alone, atol=1e-4, rtol=1e-3)
            start += count
    assert start == len(labels)


def test_exact_matches_needs_every_token_of_an_answer(parts, monkeypatch):
    model, processor, images, asked = parts
    batch = pack(images, asked, processor.tokenizer)
    labels = batch.labels[batch.labels != IGNORE]
    logits = torch.nn.functional.one_hot(labels, len(processor.tokenizer)).float()
    monkeypatch.setattr("slimvlm.demo.packing.answer_logits", lambda *_: (logits, labels))
    number = sum(map(len, asked))
    assert exact_matches(model, batch).tolist() == [True] * number
    logits[0] = 0
    assert exact_matches(model, batch).tolist() == [False] + [True] * (number - 1)


def test_questions_about_named_objects_are_drawn_often_and_never_twice():
    scene = Scene("noto", ("fox", "apple", "bus", "violin"), ("red", "blue", "green", "white"))
    rng = random.Random(0)
    rows = [choose(rng, scene, 6) for _ in range(200)]
    drawn = [question.task for row in rows for question in row]
    assert drawn.count("where") > 2 * drawn.count("at") > 4 * drawn.count("count")
    assert all(len(set(row)) == len(row) == 6 for row in rows)


def test_rate_warms_up_once_and_falls_once():
    recipe = Recipe(steps=1000, warmup=100)
    rates = [schedule(step, recipe) for step in range(1000)]
    assert rates.index(max(rates)) in (99, 100) and max(rates) == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:])) and rates[-1] < 0.03


def test_patches_name_the_object_of_their_cell(parts):
    tokenizer = parts[1].tokenizer
    words = patch_words([Scene("noto", ("fox", "apple", None, "violin"), ("red",) * 4)], tokenizer)
    grid = tokenizer.convert_ids_to_tokens(words[0].tolist())
    rows = [grid[start : start + 6] for start in range(0, 36, 6)]
    assert rows[0] == rows[2] == ["fox"] * 3 + ["apple"] * 3
    assert rows[3] == rows[5] == ["nothing"] * 3 + ["violin"] * 3
