"""A whole training in stages: a tiny model that was disturbed learns from what it was."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model
from train_options import train_options

from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import depths_of
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import make_stages, parse_recipe
from slimvlm.compress.recovery.training.stepping import Task
from slimvlm.compress.recovery.training.trainer import train

COUNT = 4


def staged_training(folder: Path, accumulate: int) -> Distiller:
    """A little more than one step per stage of `lpd`, in this process or those it has joined."""
    tiny, teacher = tiny_model("llava"), tiny_model("llava").model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    family, recipe = find_family(tiny.model.config), parse_recipe("lpd")
    stages, samples = make_stages(family, depths_of(tiny.model, family), recipe), tiny.inputs(COUNT)
    distiller = Distiller(tiny.model, teacher, family, recipe)
    options = train_options(steps=len(stages) + 1, train_batch_size=COUNT, learning_rate=1e-3, accumulate=accumulate)

    def collate(indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: value[indices] for name, value in samples.items()}

    train(distiller, Task(stages, collate, COUNT), options, folder)
    return distiller
