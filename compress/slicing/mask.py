"""The dense model with the units of a plan switched off: what a cut model must equal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.compress.models.families import Tower, find_family
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.projections import has_module
from slimvlm.compress.plan import Plan
from slimvlm.compress.slicing.cuts import Cut, complement, find_cuts, matching_groups
from slimvlm.compress.slicing.mapped import leave_files


def mask_plan(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Zeroes, in place, the rows, biases and columns that `apply_plan` would remove, and what a block that would leave
    adds to the residual stream. The sizes stay.

    Raises:
        CheckpointError: the plan was made for another model.
    """
    groups = matching_groups(model, find_family(model.config), plan)
    leave_files(model)  # before it is written into: the pages could not be given back
    with torch.no_grad():
        for group in groups:
            kept = torch.tensor(plan.keep[group.key], dtype=torch.int64)
            for cut in (*find_cuts(group, kept), *switched_off(model, group, kept)):
                module = model.get_submodule(cut.path)
                weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
                if cut.rows is not None:
                    gone = complement(cut.rows, weight.shape[0])
                    weight[gone] = 0
                    if bias is not None:
                        bias[gone] = 0
                if cut.columns is not None:
                    weight[:, complement(cut.columns, weight.shape[1])] = 0
    return model


def switched_off(model: nn.Module, group: Group, kept: Tensor) -> Iterator[Cut]:
    """No row stays of the linears through which a block that leaves adds to the residual stream."""
    if isinstance(group.part, Tower):
        for index in complement(kept, group.size).tolist():
            for part in group.part.parts:
                path = f"{group.path}.{index}.{part.exit}"
                if has_module(model, path):
                    inside = model.get_submodule(path).named_modules(prefix=path)
                    exits = [name for name, module in inside if isinstance(module, nn.Linear)]
                    yield from (Cut(name, rows=kept[:0]) for name in exits)
