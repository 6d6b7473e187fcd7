"""The stock layout: a cut model whose sizes the unmodified transformers class can build from plain config fields."""

from __future__ import annotations

import copy

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.families import Family, find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.modeling_slim import RECORD

ADVICE = "make the plan with --layout stock, or save with --layout per-layer"


def stock_model(model: PreTrainedModel) -> PreTrainedModel:
    """A view of `model` (same weights) of the unmodified class, with the config that builds these sizes.

    Raises:
        CheckpointError: the widths of one tower differ from layer to layer, or the class cannot build one of them.
    """
    record = getattr(model.config, RECORD, None)
    stock = copy.copy(model)
    stock.__class__ = getattr(type(model), "stock_class", type(model))
    stock.config = copy.deepcopy(model.config)
    if record:
        family = find_family(model.config)
        for path, fields in stock_fields(model, family, set(record["shapes"])).items():
            config = stock.config
            for name in path.split("."):
                config = getattr(config, name)
            for name, value in fields.items():
                setattr(config, name, value)
    for name in (RECORD, "auto_map"):
        if hasattr(stock.config, name):
            delattr(stock.config, name)
    _check_build(stock)
    return stock


def _check_build(model: PreTrainedModel) -> None:
    """The class must build exactly these sizes: a config field may size more than what was cut (SigLIP's pooling head),
    or be refused (Llama wants a number of heads that divides the hidden size)."""
    try:
        config = type(model.config).from_dict(model.config.to_dict())  # as a reload does: checks the values
        with torch.device("meta"):
            built = type(model)(config)
    except (ValueError, StrictDataclassError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"layout stock: the unmodified class refuses these sizes ({why}); {ADVICE}") from error
    expected = {name: tensor.shape for name, tensor in built.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if expected.get(name) != tensor.shape:
            sizes = f"{tuple(expected.get(name, ()))}, not {tuple(tensor.shape)}"
            raise CheckpointError(f"layout stock: the unmodified class would build {name} as {sizes}; {ADVICE}")


def stock_fields(model: nn.Module, family: Family, cut: set[str]) -> dict[str, dict[str, int]]:
    """Config path -> field -> value that build the present sizes of `model`, of which the modules `cut` were cut."""
    values: dict[tuple[str, str], dict[int, str]] = {}
    changed = set()
    for group in find_groups(model, family):
        sizes = {"size": group.size, "heads": group.size, "kv_heads": group.kv_heads, "head_dim": group.head_dim}
        facts = {(group.config, name): sizes[fact] for name, fact in group.part.fields}
        if cut & {member.path for member in group.members}:
            if not facts:
                raise CheckpointError(
                    f"layout stock: the unmodified class cannot build a narrower {group.key}; {ADVICE}"
                )
            changed |= set(facts)
        for field, value in facts.items():
            values.setdefault(field, {}).setdefault(value, group.key)
    fields: dict[str, dict[str, int]] = {}
    for path, name in sorted(changed):
        found = values[path, name]
        if len(found) > 1:
            where = ", ".join(f"{value} for {key}" for value, key in found.items())
            raise CheckpointError(f"layout stock: {path}.{name} would have to be {where}; {ADVICE}")
        fields.setdefault(path, {})[name] = next(iter(found))
    return fields
