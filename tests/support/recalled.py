"""A tiny model cut by half, with the slices of its dense checkpoint: where recovery begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from outputs import logits
from plans import make_plan
from tiny_models import Tiny, tiny_model
from torch import nn

from slimvlm.compress.models.experts import together
from slimvlm.compress.options import LowRank
from slimvlm.compress.plan import Plan
from slimvlm.compress.recovery.adapters.recall import RecallVariant, attach, recall_layers
from slimvlm.compress.recovery.adapters.slices import Slices
from slimvlm.compress.slicing.apply import apply_plan

SMALL = LowRank(rank=2, recall_rank=3)


@dataclass
class Case:
    tiny: Tiny
    model: nn.Module
    plan: Plan
    slices: Slices
    folder: Path

    def outputs(self, model=None):
        return logits(self.model if model is None else model, self.tiny.inputs(2))

    def attach(self, options=SMALL):
        return attach(self.model, self.plan, self.slices, options)


class _Literal(RecallVariant):
    """Every token meets the pruned slices, as the paper's formula is written; no dropout."""

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        factors = {name: getattr(module, name) for name in module.adapter_layer_names}
        factors = {name: found[active_adapter].weight for name, found in factors.items() if active_adapter in found}
        rows, columns = module.slices()
        total = x @ factors["lora_A"].T @ factors["lora_B"].T
        if "lora_rows_A" in factors:
            total = total + x @ rows.to(x.dtype).T @ factors["lora_rows_A"].T @ factors["lora_rows_B"].T
        if "lora_columns_A" in factors:
            total = total + x @ factors["lora_columns_A"].T @ factors["lora_columns_B"].T @ columns.to(x.dtype).T
        return result + total * module.scaling[active_adapter]


def literal(model):
    """The adapted model (or layer) computing as the paper's formula is written: what ours must equal."""
    for layer in recall_layers(model).values():
        layer.lora_variant = dict.fromkeys(layer.lora_variant, _Literal())
    return model


def half(group):
    """Half of a group; of the first layers' MLPs nothing is cut."""
    if group.kind == "mlp" and group.layer == 0:
        return range(group.size)
    if group.slots:
        return range(0, group.size, 2)
    return range(group.size // 2)


def make_case(folder, name="llava", choose=half, layout="per-layer", dtype=torch.float32) -> Case:
    tiny = tiny_model(name)
    with together(tiny.model.to(dtype)):
        tiny.model.save_pretrained(folder / "dense")
    plan = make_plan(tiny.model, choose, layout=layout)
    # Frozen beforehand: torch's own MultiheadAttention (SigLIP's pooling) rounds differently once nothing is trained.
    model = apply_plan(tiny.model, plan).requires_grad_(False)
    return Case(tiny, model, plan, Slices(folder / "dense", model, plan), folder)


def randomise(model, scale=0.05, seed=7):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, factor in sorted(trainable(model).items()):
            factor.copy_(scale * torch.randn(factor.shape, generator=generator))
    return model.eval()


def trainable(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
