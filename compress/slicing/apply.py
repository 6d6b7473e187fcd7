"""Carrying out a plan: cut the units out of a model, or zero them in the dense one (the reference of the cut).

Cutting works in place, one tensor at a time, so the peak is the model plus its largest tensor. It works on a model that
was cut before, and on the meta device.
"""

from __future__ import annotations

import copy
from typing import Any  # norms and experts of transformers

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm import kernels
from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.experts import ALIGNED, OUTPUT, expert_of
from slimvlm.compress.models.families import Attention, Experts, Mlp, find_family
from slimvlm.compress.models.groups import Group, count_parameters, weigh
from slimvlm.compress.models.modeling_slim import (
    RECORD,
    SCHEMA,
    Record,
    replace_forward,
    resize,
    set_attribute,
    slim_class,
)
from slimvlm.compress.plan import Plan
from slimvlm.compress.slicing.cuts import Cut, find_cuts, kept_kv_heads, matching_groups
from slimvlm.compress.slicing.depth import drop_blocks, left_out, shortened, write_depth
from slimvlm.compress.slicing.mapped import leave_files

EXPERT_BY_EXPERT = "config._experts_implementation"


def apply_plan(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Cuts `model` to `plan`, in place, and writes what was cut into `model.config.slimvlm`.

    The model's class becomes the slim form of its class (a subclass), so that its own `save_pretrained` writes a
    checkpoint that reloads. requires_grad, ties, dtypes and devices stay.

    Raises:
        CheckpointError: the plan was made for another model; nothing has been cut then.
        ValueError: the kept KV heads of a group would have different numbers of query heads.
    """
    family = find_family(model.config)
    groups = matching_groups(model, family, plan)
    kept = {group.key: torch.tensor(plan.keep[group.key], dtype=torch.int64) for group in groups}
    cuts = [cut for group in groups for cut in find_cuts(group, kept[group.key])]
    shorter = list(shortened(model, family, plan))
    after = count_parameters(model) - sum(_removed(model, cut) for cut in cuts)
    after -= sum(weigh(tower, left_out(model, tower, stay))[0] for tower, stay in shorter)
    if after != plan.parameters_after:
        raise CheckpointError(
            f"the plan says {plan.parameters_after} parameters remain, cutting this model leaves {after}; "
            "apply the plan to the checkpoint it was made for"
        )
    record = copy.deepcopy(getattr(model.config, RECORD, None)) or {
        "schema": SCHEMA, "shapes": {}, "attributes": {}, "forwards": {}, "per_layer_config": {}
    }  # fmt: skip
    leave_files(model)
    for cut in cuts:
        _cut(model.get_submodule(cut.path), cut)
        if expert_of(model, cut.path) is None:
            record["shapes"][cut.path] = list(model.get_parameter(f"{cut.path}.weight").shape)
        if cut.scale != 1.0:
            record["attributes"][cut.path] = _widen_epsilon(model.get_submodule(cut.path), cut.scale)
    for group in groups:
        if isinstance(group.part, Experts) and len(kept[group.key]) < group.size:
            _record_experts(record, group, model.get_submodule(group.path))
        _record_sizes(record, group, kept[group.key])
        if isinstance(group.part, Attention) and len(kept[group.key]) < group.size:
            _patch_attention(model.get_submodule(group.path), group, group.part, kept[group.key], record)
    for tower, stay in shorter:
        drop_blocks(model, tower, stay, record)
    for tower in family.towers if shorter else ():
        write_depth(model, tower)
    setattr(model.config, RECORD, record)
    model.__class__ = slim_class(type(model))  # type: ignore[arg-type]  # a class is hashable
    assert count_parameters(model) == plan.parameters_after
    return model


def _removed(model: nn.Module, cut: Cut) -> int:
    """Parameters that leave with `cut`."""
    module = model.get_submodule(cut.path)
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if cut.columns is not None:
        return (weight.shape[1] - len(cut.columns)) * weight.shape[0]
    if cut.rows is None:
        return 0
    return (weight.shape[0] - len(cut.rows)) * (weight[0].numel() + (bias is not None))


def _cut(module: nn.Module, cut: Cut) -> None:
    weight = _take(module.get_parameter("weight").detach(), cut.rows, cut.columns)
    if cut.scale != 1.0:
        weight = weight * cut.scale
    bias = getattr(module, "bias", None)
    resize(module, weight, list(weight.shape), None if bias is None else _take(bias.detach(), cut.rows, None))


def _widen_epsilon(norm: Any, scale: float) -> dict[str, float]:
    """What an RMS norm adds to the mean square grows with that, or the norm would not be that of the masked model."""
    norm.variance_epsilon = float(f"{norm.variance_epsilon * scale**2:.9g}")  # digits that two cuts and one agree in
    return {"variance_epsilon": norm.variance_epsilon}


def _take(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if tensor.is_meta:  # nothing is done yet where it is read later
        for dim, index in enumerate((rows, columns)):
            tensor = tensor if index is None else tensor.index_select(dim, index)
        return tensor
    rows, columns = (index if index is None else index.to(tensor.device) for index in (rows, columns))
    if tensor.ndim == 2:
        return kernels.gather_2d(tensor, rows, columns)
    return tensor.clone() if rows is None else tensor.index_select(0, rows)


def _patch_attention(module: nn.Module, group: Group, part: Attention, kept: Tensor, record: Record) -> None:
    heads, kv_heads = len(kept), len(kept_kv_heads(group, kept))
    facts = {"heads": heads, "kv_heads": kv_heads, "groups": heads // kv_heads, "width": heads * group.head_dim}
    attributes = {name: facts[fact] for name, fact in part.patch if hasattr(module, name.partition(".")[0])}
    for name, value in attributes.items():
        set_attribute(module, name, value)
    record["attributes"][group.path] = attributes
    if part.forward:
        before = record["forwards"].get(group.path, {}).get("heads", range(group.size))
        original = [before[index] for index in kept.tolist()]
        replace_forward(module, part.forward, original)
        record["forwards"][group.path] = {"name": part.forward, "heads": original}


def _record_experts(record: Record, group: Group, experts: Any) -> None:
    """What transformers' module must know: its sizes, and to compute expert by expert where its kernel cannot."""
    record.setdefault("stacked", {})[group.path] = experts.shapes
    stacked = experts.stacked
    stacked.config = getattr(stacked.config, "shared_config", stacked.config)
    record["attributes"].pop(group.path, None)
    if experts.shapes[OUTPUT][2] % ALIGNED:
        record["attributes"][group.path] = {EXPERT_BY_EXPERT: "eager"}
        set_attribute(stacked, EXPERT_BY_EXPERT, "eager")


def _record_sizes(record: Record, group: Group, kept: Tensor) -> None:
    """Sizes under the names of transformers' `per_layer_config`. That itself cannot be set: the stock layers read the
    whole tower's value, which transformers refuses once layers differ.
    """
    if group.blocks:
        return
    layer = record["per_layer_config"].setdefault(group.tower, {}).setdefault(str(group.layer), {})
    if isinstance(group.part, Mlp):
        layer["intermediate_size"] = len(kept)
    elif isinstance(group.part, Experts):
        layer["moe_intermediate_size"] = len(kept) // group.kv_heads
    elif isinstance(group.part, Attention):
        prefix = "" if group.part.key == "attn" else f"{group.part.key}_"
        layer[f"{prefix}num_attention_heads"] = len(kept)
        layer[f"{prefix}num_key_value_heads"] = len(kept_kv_heads(group, kept))
