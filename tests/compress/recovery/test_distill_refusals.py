"""What a distiller refuses: teachers that are not the student before the cut, states and batches that are not there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers
from tiny_models import tiny_model
from torch import nn

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import make_stages, parse_recipe


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return tiny_model("llava").model


def another_llava(image_size: int | None = None, **text: int) -> nn.Module:
    config = tiny_model("llava").model.config
    config.vision_config.image_size = image_size or config.vision_config.image_size
    for key, value in text.items():
        setattr(config.text_config, key, value)
    return transformers.LlavaForConditionalGeneration(config)


def distiller_of(student: nn.Module, teacher: nn.Module | None, recipe: str, **options) -> Distiller:
    return Distiller(student, teacher, find_family(student.config), replace(parse_recipe(recipe), **options))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: tiny_model("qwen2_vl").model, "the teacher is a qwen2_vl model and the student a llava model"),
        (lambda: another_llava(vocab_size=100), "the teacher has vocabulary 100, the student 96"),
        (lambda: another_llava(hidden_size=48), "the teacher has residual widths .*'language': 48"),
        (lambda: another_llava(num_hidden_layers=3), "the teacher has depths .*'language': 3"),
        (lambda: another_llava(image_size=32), "the teacher has images .*'image_size': 32"),
        (lambda: None, "learns from the dense model; name it as the teacher, or use sft"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_in_one_sentence(student, teacher, message):
    with pytest.raises(UnsuitableOptionError, match=message) as caught:
        distiller_of(student, teacher(), "lpd")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [3, -4])
def test_a_hidden_state_that_does_not_exist_is_refused(student, index):
    with pytest.raises(UnsuitableOptionError, match=f"hidden state {index} does not exist; choose from -3 to 2"):
        distiller_of(student, tiny_model("llava").model, "hidden", hidden_states=(index,))


def test_a_batch_without_labels_is_refused(student):
    batch = tiny_model("llava").inputs(2)
    del batch["labels"]
    distiller = distiller_of(student, None, "sft")
    (stage,) = make_stages(distiller.family, distiller.depths, distiller.recipe)
    with pytest.raises(ValueError, match="a batch has no labels"):
        distiller(batch, stage)
