"""Slim models: stock transformers classes whose layers may differ in width.

It needs torch and transformers only. slimvlm imports it, and every checkpoint whose layers differ carries a copy, so
that plain `AutoModel...from_pretrained(folder, trust_remote_code=True)` works where slimvlm is not installed.

What was cut stands in the config as a *record*, `config.slimvlm`, which knows no model family:

    {"schema": 1,
     "shapes": {module path: [out, in] of a linear, or [n] of a norm},
     "stacked": {module path: {tensor: its shape}} of experts, whose weights are in tensors of their module,
     "biases": {module path: size of the bias that a linear has, and the stock class's has not},
     "attributes": {module path: {attribute: value}; `config.NAME` is for this module alone},
     "forwards": {module path: {"name": key of FORWARDS, "heads": kept heads in the numbering of the dense model}},
     "per_layer_config": for the reader only: sizes per tower and layer}
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any  # classes of transformers that are extended whatever they are

import torch
import transformers
from torch import Tensor, nn

RECORD = "slimvlm"
SCHEMA = 1
FILE_NAME = "modeling_slimvlm"
PREFIX = "Slim"
Record = dict[str, Any]  # JSON, as above


def shrink(model: nn.Module, record: Record) -> None:
    """Gives a dense model the sizes of `record`, in place. Values are the leading slices of the present ones: they are
    meant to be overwritten by a checkpoint (on the meta device nothing is copied).

    Raises:
        ValueError: the record has another schema, or names a module that this model lacks.
    """
    if record.get("schema") != SCHEMA:
        raise ValueError(f"slim record: schema {record.get('schema')} is not the {SCHEMA} this file reads")
    for path, shape in record["shapes"].items():
        module = _submodule(model, path)
        resize(module, module.get_parameter("weight").detach()[tuple(slice(n) for n in shape)], shape)
    for path, shapes in record.get("stacked", {}).items():
        module = _submodule(model, path)
        for name, shape in shapes.items():
            weight = module.get_parameter(name)
            leading = weight.detach()[tuple(slice(n) for n in shape)].contiguous()
            setattr(module, name, nn.Parameter(leading, requires_grad=weight.requires_grad))
    for path in record.get("biases", ()):
        give_bias(_submodule(model, path))
    for path, attributes in record["attributes"].items():
        for name, value in attributes.items():
            set_attribute(_submodule(model, path), name, value)
    for path, forward in record["forwards"].items():
        replace_forward(_submodule(model, path), forward["name"], forward["heads"])


def resize(module: nn.Module, weight: Tensor, shape: list[int], bias: Tensor | None = None) -> None:
    """Gives a linear or norm a new weight (and bias; default: leading slice of the old one); keeps requires_grad."""
    old_bias = getattr(module, "bias", None)
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=module.get_parameter("weight").requires_grad)
    if old_bias is not None and old_bias.shape[0] != shape[0]:
        bias = old_bias.detach()[: shape[0]] if bias is None else bias
        module.bias = nn.Parameter(bias.contiguous(), requires_grad=old_bias.requires_grad)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape


def set_attribute(module: Any, name: str, value: Any) -> None:
    """Sets an attribute of a module; `config.NAME` gives it a config of its own, which differs there alone."""
    if name.startswith("config."):
        module.config = OwnConfig(module.config, {name.removeprefix("config."): value})
    else:
        setattr(module, name, value)


class OwnConfig:
    """What one module sees of a config that it shares with others: some fields are its own."""

    def __init__(self, config: Any, own: dict[str, Any]):
        self.__dict__.update(own, shared_config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "shared_config":  # asked for while it is copied
            raise AttributeError(name)
        return getattr(self.shared_config, name)


def give_bias(linear: nn.Module) -> Tensor:
    """Gives a linear without bias one of zeros, and returns it."""
    weight = linear.get_parameter("weight")
    linear.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
    return linear.bias


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"slim record: {type(model).__name__} has no module {path!r}") from None


def replace_forward(attention: Any, name: str, heads: list[int]) -> None:
    """Turns an attention into its cut form: a subclass with the forward `name` that knows its kept `heads`."""
    attention.kept_heads = list(heads)
    if not hasattr(attention, "stock_class"):
        attention.__class__ = FORWARDS[name](type(attention))


@functools.cache
def t5_position_bias(stock: Any) -> type:
    """T5 computes one bias [1, H, S, T] in block 0 and hands it from block to block; blocks that kept different heads
    take theirs and hand on the whole one. The zero bias of cross attention becomes [1, 1, S, T], which fits any block.
    """

    class SlimT5Attention(stock):
        stock_class = stock

        def forward(
            self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None, **kwargs
        ):
            if position_bias is None:
                position_bias = self._whole_bias(hidden_states, key_value_states, past_key_values)
            heads = torch.tensor(self.kept_heads, device=position_bias.device)
            output, _, weights = super().forward(
                hidden_states,
                mask=mask,
                key_value_states=key_value_states,
                position_bias=position_bias if position_bias.shape[1] == 1 else position_bias[:, heads],
                past_key_values=past_key_values,
                **kwargs,
            )
            return output, position_bias, weights

        def _whole_bias(self, hidden_states, key_value_states, cache):
            queries, past = hidden_states.shape[1], 0
            if key_value_states is not None:
                keys = key_value_states.shape[1]
            elif cache is None:
                keys = queries
            else:
                past = cache.get_seq_length(self.layer_idx)
                keys, _ = cache.get_mask_sizes(queries, self.layer_idx)
            if self.has_relative_attention_bias:
                return self.compute_bias(queries, keys, device=hidden_states.device, past_seen_tokens=past)
            bias = hidden_states.new_zeros(1, 1, queries, keys)
            return bias.requires_grad_(self.gradient_checkpointing and self.training)

    return SlimT5Attention


@functools.cache
def blip2_vision(stock: Any) -> type:
    """BLIP-2 derives the head size from the residual width and the number of heads; here it stays what it was."""

    class SlimBlip2Attention(stock):
        stock_class = stock

        def forward(self, hidden_states, **kwargs):
            from transformers.models.blip_2.modeling_blip_2 import ALL_ATTENTION_FUNCTIONS, eager_attention_forward

            lead = hidden_states.shape[:-1]  # sizes are read here, so that a trace does not fix them
            qkv = self.qkv(hidden_states).reshape(*lead, 3, -1, self.head_dim)  # B S 3 H D
            query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # B H S D
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            dropout = self.attention_dropout if self.training else 0.0
            mixed, weights = attend(
                self, query, key, value, attention_mask=None, dropout=dropout, scaling=self.scale, **kwargs
            )
            return self.projection(mixed.reshape(*lead, -1)), weights

    return SlimBlip2Attention


FORWARDS: dict[str, Callable[[Any], type]] = {"t5_position_bias": t5_position_bias, "blip2_vision": blip2_vision}


@functools.cache
def slim_class(base: Any) -> Any:
    """The class `Slim<base>`: `base`, shrunk as the record of its config says (without a record it is `base`).

    from_pretrained builds it on the meta device, so the dense weights never exist; save_pretrained writes names that
    need no conversion (transformers converts names for its own classes only) and adds this file.
    """
    if getattr(base, "stock_class", None) is not None:
        return base

    class Slim(base):
        stock_class = base

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            if record := getattr(config, RECORD, None):
                shrink(self, record)

        def save_pretrained(self, save_directory, *args, **kwargs):
            if not getattr(self.config, "auto_map", None):
                self.config.auto_map = auto_map(self.config, base)
            super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})
            shutil.copyfile(__file__, Path(os.fspath(save_directory), FILE_NAME + ".py"))

    Slim.__name__ = Slim.__qualname__ = PREFIX + base.__name__
    return Slim


def auto_map(config: transformers.PreTrainedConfig, base: type) -> dict[str, str]:
    """For every AutoModel class that resolves this config to `base`: where its slim form is."""
    result = {}
    for name in _auto_models():
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is not None and type(config) in mapping and base in _classes(mapping[type(config)]):
            result[name] = f"{FILE_NAME}.{PREFIX}{base.__name__}"
    return result


@functools.cache
def _auto_models() -> list[str]:
    return [name for name in dir(transformers) if name.startswith("AutoModel")]


def _classes(value: type | tuple[type, ...]) -> tuple[type, ...]:
    return value if isinstance(value, tuple) else (value,)


def __getattr__(name: str) -> type:
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return slim_class(base)
