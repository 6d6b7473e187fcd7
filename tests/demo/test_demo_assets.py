"""The packaged model and samples are what their cards say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from slimvlm import demo
from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.samples import load_samples
from slimvlm.compress.evaluation.evaluate import evaluate
from slimvlm.compress.models.families import find_family
from slimvlm.demo.evaluate import blind, by_task

SPLITS = ("train", "val", "test", "vendor", "photos")


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def read(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_model_loads_plainly_and_answers_test_questions():
    model = AutoModelForImageTextToText.from_pretrained(demo.MODEL, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(demo.MODEL)
    samples = load_samples(demo.SAMPLES / "test.jsonl").samples[:64]
    quality = evaluate(model, Collator(processor, find_family(model.config), model.config), samples)
    assert quality.score > 0.7, by_task(quality)


def test_a_blind_question_is_asked_about_the_image_half_a_split_on():
    samples = load_samples(demo.SAMPLES / "test.jsonl").samples[:64]
    images = list(dict.fromkeys(sample.image for sample in samples))
    for seeing, unseeing in zip(samples, blind(samples), strict=True):
        moved = images.index(seeing.image) + len(images) // 2
        assert unseeing.image == images[moved % len(images)] and unseeing.turns == seeing.turns


def test_model_has_grouped_queries_and_the_promised_size():
    model = AutoModelForImageTextToText.from_pretrained(demo.MODEL)
    text = model.config.text_config
    assert text.num_key_value_heads < text.num_attention_heads
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 6e6


def test_assets_stay_small():
    assert _megabytes(demo.MODEL) <= 12
    assert _megabytes(demo.SAMPLES) <= 8
    assert sum(1 for _ in demo.SAMPLES.rglob("*")) <= 2500


def test_weights_are_safetensors_in_half_precision():
    assert not [path for path in demo.MODEL.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    model = AutoModelForImageTextToText.from_pretrained(demo.MODEL, dtype="auto")
    assert model.dtype == torch.float16


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_of_a_split_exists(split):
    missing = {s["image"] for s in read(demo.SAMPLES, split) if not (demo.SAMPLES / s["image"]).is_file()}
    assert not missing


def test_splits_share_no_scene():
    described = {split: {s["answer"] for s in read(demo.SAMPLES, split) if s["task"] == "describe"} for split in SPLITS}
    for index, one in enumerate(SPLITS):
        for other in SPLITS[index + 1 :]:
            assert not described[one] & described[other]


def test_one_vendor_per_image_and_the_held_out_vendor_only_in_its_split():
    for split in SPLITS:
        samples = read(demo.SAMPLES, split)
        assert len({(s["image"], s["vendor"]) for s in samples}) == len({s["image"] for s in samples})
        assert ("twemoji" in {s["vendor"] for s in samples}) == (split == "vendor")


def test_licences_name_every_vendor():
    text = (Path(demo.__file__).parent / "LICENSES.md").read_text(encoding="utf-8")
    for vendor in {s["vendor"] for split in SPLITS for s in read(demo.SAMPLES, split)}:
        assert f"`{vendor}`" in text


def test_every_word_of_the_samples_is_in_the_tokenizer():
    tokenizer = AutoProcessor.from_pretrained(demo.MODEL).tokenizer
    texts = {s[key] for split in SPLITS for s in read(demo.SAMPLES, split) for key in ("question", "answer")}
    assert not [text for text in texts if tokenizer.unk_token_id in tokenizer(text).input_ids]
