"""A config that builds and does not compute is refused before anything long begins, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exports import tiny_samples
from tiny_models import FACTORIES, tiny_model
from tiny_processors import tiny_processor

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.evaluation.soundness import check_answers, check_computes
from slimvlm.compress.models.families import find_family

DUAL = ("clip", "siglip")


def model_and_collator(name: str) -> tuple[torch.nn.Module, Collator]:
    model = tiny_model(name).model
    return model, Collator(tiny_processor(name), find_family(model.config), model.config)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_sound_model_computes_and_answers(name: str) -> None:
    model, collator = model_and_collator(name)
    sample = tiny_samples(1)[0]
    check_computes(model, collator, sample, "model")
    if name not in DUAL:
        check_answers(model, collator, sample, "model")


@pytest.mark.parametrize("name", FACTORIES)
def test_a_module_that_fails_is_a_refusal_with_the_folder(name: str) -> None:
    model, collator = model_and_collator(name)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for linear in linears:
        linear.weight = torch.nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(CheckpointError, match=r"out/model: the model cannot compute sample 0 \(.*do not fit together"):
        check_computes(model, collator, tiny_samples(1)[0], Path("out/model"))


@pytest.mark.parametrize("name", FACTORIES)
def test_a_loss_that_is_no_number_is_a_refusal(name: str) -> None:
    model, collator = model_and_collator(name)
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = float("nan")
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = float("nan")
    with pytest.raises(CheckpointError, match="no finite number"):
        check_computes(model, collator, tiny_samples(1)[0], "model")


@pytest.mark.parametrize("name", FACTORIES)
def test_a_tokenizer_with_more_tokens_than_the_model_is_a_refusal(name: str) -> None:
    """On a GPU the id past the table would end the process."""
    model, collator = model_and_collator(name)
    model.config.get_text_config().vocab_size = 5
    with pytest.raises(CheckpointError, match=r"the tokenizer gives the id \d+, the model has 5 tokens"):
        check_computes(model, collator, tiny_samples(1)[0], "model")
