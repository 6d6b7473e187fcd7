"""Linears in 8 or 4 bits through torchao: made of float weights in memory, written as transformers reads them again.

Embeddings, the output head, convolutions and norms stay as they are, as in transformers' own loader. That loader is not
asked to quantize: it fails on families without `get_input_embeddings` (CLIP), and takes a bias for a weight where
matrices differ in how they are quantized.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast  # torchao's configs and tensors, and the loaders of transformers

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from slimvlm.compress.errors import MissingDependencyError, UnsuitableOptionError
from slimvlm.compress.files.decoding import content_of, parse
from slimvlm.compress.models.experts import put_together
from slimvlm.compress.models.streaming.lazy import Lazy, Made, Part, trim
from slimvlm.compress.options import BLOCK, IN_TORCH

NO_TORCHAO = "8 and 4 bits in torch need torchao: pip install 'slimvlm[torchao]'"
PACKED_ROWS = 16  # torch's 4-bit kernel of a CPU takes multiples of so many outputs
TYPES = {"Int8WeightOnlyConfig": "int8", "IntxWeightOnlyConfig": "int4"}  # torchao's names of what is made here


def require_torchao() -> None:
    """Raises MissingDependencyError if it is not here."""
    if importlib.util.find_spec("torchao") is None:
        raise MissingDependencyError(NO_TORCHAO)


def held_form(folder: Path) -> str | None:
    """Of IN_TORCH what the weights of a checkpoint folder are in; None: floating point, or somebody else's form."""
    try:
        config = parse(content_of(folder / "config.json"))
    except (OSError, ValueError):  # refused by whoever needs it
        return None
    asked = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(asked, dict) or asked.get("quant_method") != "torchao":
        return None
    kinds = asked.get("quant_type")
    kind = kinds.get("default") if isinstance(kinds, dict) else None
    return TYPES.get(str(kind.get("_type"))) if isinstance(kind, dict) else None


def check_dtype(form: str | None, dtype: str) -> None:
    """Raises UnsuitableOptionError if weights of this form compute in another dtype alone."""
    only = IN_TORCH[form] if form else None
    if only and dtype not in ("auto", only):
        raise UnsuitableOptionError(
            f"--dtype {dtype}: torch:{form} computes in {only} only, in which its kernels are; leave --dtype out"
        )


def quantize(model: PreTrainedModel, form: str) -> dict[str, int]:
    """Puts linears of a float model into 8 bits (a scale per output) or 4 (a scale and a zero per 32 weights of a row),
    in place, and prepares the model to be saved so: of one that is streamed, a weight at a time is read then. A row
    whose length is no multiple of 32 is kept in 8 bits.

    Returns:
        Form -> linears that are in it now.

    Raises:
        MissingDependencyError: no torchao.
    """
    require_torchao()
    put_together(model)  # stacked experts are no linears: they stay as they are
    from transformers import TorchAoConfig
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    if (only := IN_TORCH[form]) is not None:
        for parameter in model.parameters():  # also those that the family's class would keep in fp32
            parameter.data = parameter.data.to(getattr(torch, only))
    linears = quantizable(model)
    lazy = {name: linear.weight for name, linear in linears.items() if isinstance(linear.weight, Lazy)}
    for name, weight in lazy.items():
        linears[name].weight = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"))
    names = _put_into(model, linears, form)
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in linears]

    class Quantizer(TorchAoHfQuantizer):
        def get_state_dict_and_metadata(self, model: Any) -> Flat:
            return _flattened(model, lazy, names)

    settings, prepared = TorchAoConfig(CONFIGS[form](), modules_to_not_convert=others), cast("Any", model)
    prepared.config.quantization_config = settings
    prepared.hf_quantizer = Quantizer(settings)
    return dict(Counter(names.values()))


def hold_in(model: PreTrainedModel, form: str, besides: Collection[nn.Module] = ()) -> list[nn.Linear]:
    """Puts linears of a float model into `form` as `quantize` does, to be computed with alone, in the dtype they had;
    those that are in it now.

    Args:
        besides: linears that stay as they are.

    Raises:
        MissingDependencyError: no torchao.
    """
    require_torchao()
    linears = {name: linear for name, linear in quantizable(model).items() if linear not in besides}
    _put_into(model, linears, form)
    return list(linears.values())


def _put_into(model: PreTrainedModel, linears: Mapping[str, nn.Linear], form: str) -> dict[str, str]:
    """By name the form that each of the linears is in now: rows that are no multiples of a block are in 8 bits."""
    from torchao.quantization import quantize_

    names = {name: form if linear.in_features % BLOCK == 0 else "int8" for name, linear in linears.items()}
    for kind in set(names.values()):
        quantize_(model, CONFIGS[kind](), filter_fn=lambda _, name, kind=kind: names.get(name) == kind)
    return names


def quantizable(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linears that are called, besides the output head. torch's own attention (the pooling of SigLIP) reads the
    weights of its parts without calling them; torchao takes no matrix of one column.
    """
    head = model.get_output_embeddings()
    read = {
        part for module in model.modules() if isinstance(module, nn.MultiheadAttention) for part in module.modules()
    }
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name: one
        for name, one in found.items()
        if one is not head and one not in read and one.weight.numel() > len(one.weight)
    }


def pack(model: PreTrainedModel) -> None:
    """Puts 4-bit weights, which files hold in a byte each, in the form of torch's 4-bit kernel, two in a byte: on a CPU
    alone, which has that kernel for bfloat16. Their values stay what they are; such a model cannot be saved.
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Linear)
            and hasattr(module.weight, "target_dtype")
            and module.weight.device.type == "cpu"
        ):
            module.weight = nn.Parameter(_packed(module.weight), requires_grad=False)


def typed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`, also of an 8-bit weight, whose own `to` leaves its dtype as it was."""
    if type(weight).__name__ != "Int8Tensor":
        return weight.to(dtype)
    held: Any = weight
    made: Tensor = type(held)(held.qdata, held.scale, held.block_size, dtype, zero_point=held.zero_point)
    return made


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

    # Int4WeightOnlyConfig, the usual one, has no layout that a CPU can make.
    four: torch.dtype = torch.int4  # type: ignore[attr-defined]
    return IntxWeightOnlyConfig(four, PerGroup(BLOCK), MappingType.ASYMMETRIC)


Flat = tuple[dict[str, Tensor], dict[str, str]]  # what a file holds: tensors, and what is said of them
CONFIGS: dict[str, Callable[[], Any]] = {"int8": _int8, "int4": _int4}


def _flattened(model: nn.Module, lazy: Mapping[str, Lazy], names: Mapping[str, str]) -> Flat:
    """As torchao writes it, but with nothing said of plain tensors: it cannot read that of one whose name has no dot,
    and reads all that is said again for every tensor.

    Args:
        lazy: by the name of a linear its weight, in the place of which the model has one of its form without values.
        names: the form of each linear.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    state = model.state_dict()
    plain = {name: value for name, value in state.items() if type(value) in (Tensor, Lazy)}
    tensors, said = flatten_tensor_state_dict({**state, **dict.fromkeys(plain, torch.empty(0))})
    tensors |= plain
    for name, weight in lazy.items():
        made, linear = Made(partial(_parts, names[name]), ((weight.source,), {})), model.get_submodule(name)
        for number, part in enumerate(key for key in tensors if key.startswith(f"{name}._weight_")):
            tensors[part] = Lazy.of(Part(made, number), tensors[part])
            # `save_pretrained` looks in the model for what is on the meta device.
            linear.register_buffer(part.rpartition(".")[2], tensors[part], persistent=False)
    kept = [name for name in json.loads(said["tensor_names"]) if json.loads(said[name])["_type"] != "Tensor"]
    return tensors, {**{name: said[name] for name in kept}, "tensor_names": json.dumps(kept)}


def _parts(form: str, weight: Tensor) -> list[Tensor]:
    """What torchao stores of a weight, in its order."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, CONFIGS[form]())
    parts = list(flatten_tensor_state_dict(linear.state_dict(prefix="linear."))[0].values())
    trim()
    return parts


def _packed(weight: Any) -> Tensor:
    """The kernel multiplies by (code - 8) scale + zero; what is packed are (code - zero code) scale."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    filled = (0, 0, 0, -weight.shape[0] % PACKED_ROWS)
    codes = functional.pad(weight.qdata.int() + 8, filled)
    scale, zero = weight.scale, -weight.zero_point.to(weight.dtype) * weight.scale
    made: Tensor = Int4OpaqueTensor(
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        pack_tinygemm_scales_and_zeros(functional.pad(scale, filled), functional.pad(zero, filled), weight.dtype),
        list(weight.block_size),
        weight.shape,
    )
    return made
