"""Whole trainings: a tiny model that was disturbed learns from what it was, from samples of different lengths."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model
from torch import Tensor
from train_options import train_options

from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import depths_of
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import make_stages, parse_recipe
from slimvlm.compress.recovery.training.stepping import Task
from slimvlm.compress.recovery.training.trainer import train

COUNT = 5  # samples, all of which a step has
TRAININGS = (  # family, recipe: every loss, where logits are shifted, where they are not, and of pairs
    ("llava", "lpd+rkl"),
    ("llava", "lpd-paper"),
    ("blip2_t5", "lpd"),
    ("clip", "lpd"),
    ("siglip", "sft+kl+0.5*rkl+hidden"),
)


def staged_training(folder: Path, name: str, recipe_text: str, accumulate: int = 1) -> Distiller:
    """A little more than one step per stage, in this process or those it has joined."""
    tiny, teacher = tiny_model(name), tiny_model(name).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    family, recipe = find_family(tiny.model.config), parse_recipe(recipe_text)
    stages, samples = make_stages(family, depths_of(tiny.model, family), recipe), tiny.inputs(COUNT)
    if not family.contrastive:
        _shorten(samples)
    distiller = Distiller(tiny.model, teacher, family, recipe)
    options = train_options(steps=len(stages) + 2, train_batch_size=COUNT, learning_rate=1e-3, accumulate=accumulate)

    def collate(indices: list[int]) -> dict[str, Tensor]:
        batch = {key: value[indices] for key, value in samples.items()}
        return distiller.located(batch if recipe.literal or family.contrastive else _as_short_as_may_be(batch))

    train(distiller, Task(stages, collate, COUNT), options, folder)
    return distiller


def _shorten(samples: dict[str, Tensor]) -> None:
    """Take up to three of the four answer tokens from each sample."""
    for number in range(COUNT):
        if gone := number % 4:
            samples["labels"][number, -gone:] = -100
            samples["attention_mask"][number, -gone:] = 0


def _as_short_as_may_be(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padded to the longest of these, as a collator would."""
    gone = batch["attention_mask"].shape[1] - int(batch["attention_mask"].sum(1).max())
    per_token = ("input_ids", "attention_mask", "labels")
    return {key: value[:, : value.shape[1] - gone] if key in per_token else value for key, value in batch.items()}
