"""How models are compared: by the outputs somebody reads."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FACTORIES, tiny_model
from tiny_processors import tiny_image, tiny_processor

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.evaluation.equality import (
    TOLERANCE,
    outputs,
    relative_difference,
    relative_error,
    reload_difference,
)
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.computing import attend_as
from slimvlm.compress.models.families import find_family


def batch_of(name: str, folder: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny model, and two samples of different lengths."""
    model = tiny_model(name).model
    samples = []
    turns = (("what ?", "a cat"), ("what is on the left ?", "a small red house and a tree"))
    for index, turn in enumerate(turns):
        path = folder / f"{index}.png"
        tiny_image(seed=index).save(path)
        samples.append(Sample(path, (Turn(turn[0], (turn[1],)),), str(index)))
    return model, Collator(tiny_processor(name), find_family(model.config), model.config).training(samples)


@pytest.mark.parametrize("name", [name for name in FACTORIES if name not in ("clip", "siglip")])
def test_what_stands_in_the_padding_changes_no_comparison(name: str, tmp_path: Path) -> None:
    model, batch = batch_of(name, tmp_path)
    padding = ~batch["attention_mask"].bool()
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][padding] = (batch["input_ids"][padding] == 1).long() + 1
    assert padding.any()
    assert relative_difference(outputs(model, batch), outputs(model, other)) <= 1e-6


@pytest.mark.parametrize("name", ["llava", "blip2_t5"])
def test_every_token_that_is_read_is_compared(name: str, tmp_path: Path) -> None:
    model, batch = batch_of(name, tmp_path)
    read = (batch["labels"] != -100) if name == "blip2_t5" else batch["attention_mask"].bool()
    assert outputs(model, batch).shape == (read.sum(), model.config.get_text_config().vocab_size)


@pytest.mark.parametrize("name", ["llava", "blip2_t5"])
def test_no_loss_is_computed_to_compare(name: str, tmp_path: Path) -> None:
    model, batch = batch_of(name, tmp_path)
    asked: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _module, _given, words: asked.append(words), with_kwargs=True)
    outputs(model, batch)
    assert "labels" not in asked[0]  # a loss takes copies of all logits


def test_a_difference_is_relative_to_the_largest_logit_but_to_one_at_least() -> None:
    assert relative_difference(torch.tensor([100.0, 0.0]), torch.tensor([100.0, 1.0])) == pytest.approx(0.01)
    assert relative_difference(torch.tensor([0.1, 0.0]), torch.tensor([0.1, 0.5])) == pytest.approx(0.5)


def test_an_error_is_that_of_the_norms() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


@pytest.mark.parametrize("measure", [relative_difference, relative_error])
def test_a_value_that_is_no_number_equals_nothing(measure: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    assert math.isnan(measure(torch.ones(2), torch.tensor([1.0, math.nan])))


def test_a_device_that_adds_in_another_order_reloads_what_was_saved(tmp_path: Path) -> None:
    model, batch = batch_of("llava", tmp_path)
    reloaded = tiny_model("llava").model
    reloaded.lm_head.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-7) + 1e-6)
    assert 0 < reload_difference(model, reloaded, batch, tmp_path) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("what", ["last bit", "shape", "outputs"])
def test_a_weight_that_is_not_what_was_saved_is_found_though_the_outputs_agree(what: str, tmp_path: Path) -> None:
    model, batch = batch_of("llava", tmp_path)
    reloaded = tiny_model("llava").model
    weight = reloaded.lm_head.weight.data
    if what == "last bit":
        weight[-1, -1] = weight[-1, -1].nextafter(torch.tensor(9.0))
    elif what == "shape":
        reloaded.lm_head.weight.data = torch.cat([weight, weight[-1:]])
    else:
        reloaded.lm_head.register_forward_hook(lambda module, inputs, output: output + 1e-3)
    with pytest.raises(CheckFailedError, match=r"lm_head\.weight is not reloaded|outputs"):
        reload_difference(model, reloaded, batch, tmp_path)


def test_a_model_attends_as_another_whose_parts_differ_in_what_they_can(tmp_path):
    """Gemma 2 has no fused attention: asked for it, the model keeps it to its tower."""
    tiny_model("paligemma (siglip, gemma2)", "sdpa").model.save_pretrained(tmp_path)
    fused, plain = (load_model(tmp_path, attention=attention).model for attention in ("sdpa", "eager"))
    attend_as(plain, fused)
    for model in (fused, plain):
        parts = (model.config.vision_config, model.config.text_config)
        assert [part._attn_implementation for part in parts] == ["sdpa", "eager"]
