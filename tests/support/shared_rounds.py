"""Compensations, and plans with compensated rounds, of tiny models: by one process, or shared by those of a group."""

from __future__ import annotations

from pathlib import Path

import torch
from plans import random_plan
from tiny_models import Tiny, tiny_model

from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.models.checkpoint import stream_model
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.rounds import Planned, Planning, plan_in_rounds
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.rows import CalibrationOptions

FEW = ("llava", "clip", "blip2_t5")
SAMPLES = (3, 2, 4)  # of a batch; with four processes one has none


def batches_of(tiny: Tiny) -> list[dict[str, torch.Tensor]]:
    """Batches of different samples, every token of the text answered."""
    batches = []
    for number, samples in enumerate(SAMPLES):
        batch = tiny.inputs(samples)
        generator = torch.Generator().manual_seed(number)
        batch["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=generator)
        batches.append({"labels": batch["input_ids"].clone(), **batch})
    return batches


def streamed(folder: Path, name: str) -> Tiny:
    """The model, read block by block from `folder`, where `save` put it."""
    return Tiny(stream_model(folder / name, attention="sdpa").model, tiny_model(name, "sdpa").inputs)


def save(folder: Path, name: str) -> None:
    """Put the model where `streamed` finds it."""
    save_checkpoint(folder / name, tiny_model(name, "sdpa").model, None, None)


def statistics_of(tiny: Tiny) -> dict[str, torch.Tensor]:
    """Some that need a backward pass and one that needs none."""
    family = find_family(tiny.model.config)
    groups = find_groups(tiny.model, family)
    seen = collect(
        tiny.model, family, groups, batches_of(tiny), CalibrationOptions(("gate", "first", "input-norms"))
    ).seen
    return {f"{name} {key}": value for name, values in seen.items() for key, value in values.items()}


def compensate_all(tiny: Tiny) -> dict[str, torch.Tensor]:
    """The weights and biases of every compensation of a random cut, and what it loses."""
    family, plan = find_family(tiny.model.config), random_plan(tiny.model)
    groups = find_groups(tiny.model, family, plan.attention_unit)
    batches = [lambda batch=batch: batch for batch in batches_of(tiny)]
    found: dict[str, torch.Tensor] = {}
    for row in COMPENSATIONS.values():
        if row.place is not None:
            fitted = row(tiny.model, family, groups, plan.keep, batches)
            found[f"{row.name} lost"] = torch.tensor([fitted.lost_by_cut, fitted.lost])
            for path, (weight, bias) in fitted.weights.items():
                found[f"{row.name} {path}"] = weight.contiguous()
                if bias is not None:
                    found[f"{row.name} {path} bias"] = bias
    return found


def planned(tiny: Tiny) -> Planned:
    """Two rounds, refitted between."""
    planning = Planning(Budget(0.2, allocator="global"), CRITERIA["gate"], rounds=2, between="refit")
    return plan_in_rounds(tiny.model, lambda _: batches_of(tiny), planning)


def stirred(tiny: Tiny) -> Tiny:
    """The model with weights a hundred times as far off as rounding ever makes them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tiny.model.parameters():
            weight *= 1 + 1e-4 * torch.randn(weight.shape, generator=generator)
    return tiny
