"""The dense model with the units of a plan switched off: what a cut model must equal."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from slimvlm.compress.models.families import find_family
from slimvlm.compress.plan import Plan
from slimvlm.compress.slicing.cuts import complement, find_cuts, matching_groups


def mask_plan(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Zeroes, in place, the rows, biases and columns that `apply_plan` would remove. The sizes stay.

    Raises:
        CheckpointError: the plan was made for another model.
    """
    with torch.no_grad():
        for group in matching_groups(model, find_family(model.config), plan):
            for cut in find_cuts(group, torch.tensor(plan.keep[group.key], dtype=torch.int64)):
                module: Any = model.get_submodule(cut.path)
                if cut.rows is not None:
                    gone = complement(cut.rows, module.weight.shape[0])
                    module.weight[gone] = 0
                    if getattr(module, "bias", None) is not None:
                        module.bias[gone] = 0
                if cut.columns is not None:
                    module.weight[:, complement(cut.columns, module.weight.shape[1])] = 0
    return model
