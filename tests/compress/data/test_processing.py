"""A stranger's chat template, tokenizer and image processor: refused where they fail, stopped where they loop."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest
from fuzz_damage import TEMPLATES
from tiny_models import FACTORIES, tiny_model
from tiny_processors import CHAT, tiny_image, tiny_processor

from slimvlm.compress.data import processing
from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import CheckpointError, SlimvlmError
from slimvlm.compress.models.families import find_family

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def collator(name: str, change=lambda processor: None) -> Collator:
    processor = tiny_processor(name)
    change(processor)
    config = tiny_model(name).model.config
    return Collator(processor, find_family(config), config)


def sample(text: str = "what is it") -> Sample:
    buffer = io.BytesIO()
    tiny_image().save(buffer, "PNG")
    return Sample(Path("0.png"), (Turn(text, ("red",)),), "set.jsonl:1", content=buffer.getvalue())


def templated(template: str):
    return lambda processor: setattr(processor, "chat_template", template)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(processing, "MOST_LINES", 1_000_000)


@pytest.mark.parametrize("template", [LOOP, CHAT + LOOP])
def test_a_template_that_loops_is_stopped(impatient, template):
    with pytest.raises(CheckpointError, match="chat template of LlavaProcessor fails .*does not end within"):
        collator("llava", templated(template)).training([sample()])


def test_a_template_is_stopped_in_any_thread_and_tracing_is_as_before(impatient):
    said = []

    def render():
        try:
            collator("llava", templated(LOOP)).prompts([sample()])
        except CheckpointError as error:
            said.append(str(error))

    before = sys.gettrace()
    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    render()
    assert len(said) == 2
    assert all("does not end" in text for text in said)
    assert sys.gettrace() is before


@pytest.mark.parametrize("template", [one for one in TEMPLATES if "range" not in one])
def test_a_template_that_fails_is_refused_in_one_line(template):
    try:
        collator("llava", templated(template)).training([sample()])
    except SlimvlmError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 700


def test_no_real_template_comes_near_the_limit(monkeypatch):
    """Six thousand characters and thirty turns take a tenth of what is allowed, compiling included."""
    monkeypatch.setattr(processing, "MOST_LINES", processing.MOST_LINES // 10)
    turns = tuple(Turn("what is it", ("red",)) for _ in range(30))
    talk = Sample(Path("0.png"), turns, "set.jsonl:1", content=sample().content)
    patient = collator("llava", templated("{% if 0 %}" + 19 * CHAT + "{% endif %}" + CHAT))
    patient.max_text_tokens = 10_000
    assert patient.training([talk])["input_ids"].shape[1] > 200


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_image_deviation_of_zero_or_nan_is_refused(name, value):
    with pytest.raises(SlimvlmError, match="image_std|cannot prepare"):
        collator(name, lambda one: setattr(one.image_processor, "image_std", [value] * 3)).training([sample()])


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("field", ["size", "image_mean", "rescale_factor", "resample"])
@pytest.mark.parametrize("value", ["x", -5, {"height": -1, "width": 0}, float("nan")])
def test_wrong_values_of_an_image_processor_are_refused_or_of_no_effect(name, field, value):
    try:
        collator(name, lambda one: setattr(one.image_processor, field, value)).training([sample()])
    except SlimvlmError as error:
        assert "\n" not in str(error)


def test_a_tokenizer_that_fails_is_refused():
    with pytest.raises(CheckpointError, match="cannot encode a text of 1 characters .*; check tokenizer.json"):
        processing.encode(tiny_processor("llava").tokenizer, "\ud800")
