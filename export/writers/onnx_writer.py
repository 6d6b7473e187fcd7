"""One graph -> ONNX: the dynamo exporter first, the TorchScript-based one where that fails.

An exporter may silently fix an axis that was asked to vary; the graph is looked at, and such a one is refused. Weights
are read when they are written, one after the other: no second copy of them is ever in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import onnx_ir
import torch
import torch.nn.functional as F
from onnx_ir import ExternalTensor
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.streaming.lazy import Lazy, read
from slimvlm.export.graphs.graph import Graph
from slimvlm.export.graphs.sizes import is_streamed, output_shapes
from slimvlm.export.options import DYNAMO, TORCHSCRIPT, ExportOptions
from slimvlm.export.running.quiet import quiet
from slimvlm.export.variants import FULL, VARIANTS, Variant
from slimvlm.export.writers.tracing import exported_program, first_line

INSIDE_BYTES = 256  # smaller weights stand in the graph


@dataclass(frozen=True, slots=True)
class Traced:
    """A graph as ONNX, in memory but for its weights: by which exporter, opset, and why not by the first, if so."""

    model: onnx_ir.Model
    exporter: str
    opset: int
    fallback_reason: str | None = None


def write_onnx(graph: Graph, path: Path, options: ExportOptions) -> Traced:
    """`trace_onnx` and `write_variant`, of the graph as it is traced."""
    traced = trace_onnx(graph, options)
    write_variant(traced.model, path, VARIANTS[FULL], options.external_bytes)
    return traced


def write_variant(traced: onnx_ir.Model, path: Path, variant: Variant, external_bytes: int) -> None:
    """Writes a traced model as the variant has it, with files of its writer's in between in the same folder."""
    model = traced.clone()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        if variant.writer is not None:
            model = resolve_name(variant.writer)(model, variant, Path(scratch))
        save_onnx(model, path, external_bytes)


def trace_onnx(graph: Graph, options: ExportOptions) -> Traced:
    """The graph as ONNX; its weights are those of the module, which `save_onnx` reads.

    Raises:
        UnsupportedModelError: no exporter gives this graph with all its axes.
    """
    wanted = (DYNAMO, TORCHSCRIPT) if options.exporter == "auto" else (options.exporter,)
    if is_streamed(graph.module):  # the other exporter copies every weight
        wanted = (DYNAMO,)
    failures = []
    for exporter in wanted:
        try:
            with quiet(), torch.no_grad():
                model = WRITTEN_BY[exporter](graph, options.opset)
                check_axes(graph, model)
        except OSError:
            raise
        except Exception as error:  # exporters raise whatever the traced code makes them raise
            failures.append(f"{exporter}: {first_line(error)}")
            continue
        _name_shapes(graph, model)
        return Traced(model, exporter, model.opset_imports[""], "; ".join(failures) or None)
    raise UnsupportedModelError(f"{graph.name} cannot be exported to ONNX ({'; '.join(failures)})")


def save_onnx(model: onnx_ir.Model, path: Path, external_bytes: int) -> None:
    """Saves a model, with its weights in `<name>.onnx_data` beside it (the name transformers.js expects) if large.

    Of a weight only the tensor is written, not its shape a second time: int8 transposes weights and then finds the
    second one wrong. Weights that are in another graph's file stay there. What the exporter notes of every operator
    (lines of code, paths of this machine) is left out: in a small model it is as large as the int8 weights of a layer.

    Raises:
        OSError: the file cannot be written.
    """
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.shape = value.type = None
        value.metadata_props.clear()
    data = path.with_name(data_name(path))
    held = [(value, value.const_value) for value in model.graph.initializers.values() if value.const_value is not None]
    own = [(value, tensor) for value, tensor in held if not _stays(tensor, data)]
    large = [(value, tensor) for value, tensor in own if tensor.nbytes > INSIDE_BYTES]
    if large and sum(tensor.nbytes for _, tensor in large) >= external_bytes:
        values, tensors = zip(*large, strict=True)
        with quiet():  # it warns that what was in the file before is no more
            beside = onnx_ir.external_data.convert_tensors_to_external(tensors, path.parent, data.name)
        for value, apart in zip(values, beside, strict=True):
            value.const_value = apart
    else:
        for value, tensor in own:
            if isinstance(tensor, ExternalTensor):
                value.const_value = onnx_ir.tensor(numbers(tensor), name=value.name)
        data.unlink(missing_ok=True)
    onnx_ir.save(model, path)


def _stays(tensor: onnx_ir.TensorProtocol, data: Path) -> bool:
    """Whether a weight is in a file already, and that is not the one to be written."""
    return isinstance(tensor, ExternalTensor) and Path(tensor.location).name != data.name


def numbers(tensor: onnx_ir.TensorProtocol, first: int = 0, most: int | None = None) -> np.ndarray:
    """A weight as an array, or `most` of its numbers from the `first` on, in one row.

    What is in a file is read: of a mapped one all that was looked at would stay in memory.
    """
    if isinstance(tensor, ExternalTensor):
        kind = tensor.dtype.numpy()
        count = tensor.size if most is None else min(most, tensor.size - first)
        read = np.fromfile(tensor.path, kind, count, offset=(tensor.offset or 0) + first * kind.itemsize)
        return read if most is not None else read.reshape(tensor.shape.numpy())
    held = tensor.numpy()
    return held if most is None else held.reshape(-1)[first : first + most]


def data_name(path: Path) -> str:
    """Name of the file with the weights of `path`, where they are apart."""
    return path.name + "_data"


def check_axes(graph: Graph, model: onnx_ir.Model) -> None:
    """Raises ValueError if an axis that varies has become a number, or an input is gone."""
    given = {value.name: value for value in model.graph.inputs}
    for port in graph.inputs:
        if port.name not in given:
            raise ValueError(f"input {port.name} is missing in the graph")
        shape = given[port.name].shape
        for axis, name in port.axes.items():
            if shape is None or isinstance(shape[axis], int):
                raise ValueError(f"axis {axis} ({name}) of {port.name} is fixed in the graph")


def _by_dynamo(graph: Graph, opset: int) -> onnx_ir.Model:
    program = torch.onnx.export(
        exported_program(graph),
        dynamo=True,
        input_names=[port.name for port in graph.inputs],
        output_names=list(graph.outputs),
        opset_version=opset,
        verbose=False,
        optimize=False,
    )
    if program is None:
        raise ValueError("the exporter gave nothing")
    _read_when_written(graph.module, program.model)
    _turn_when_written(program.model)
    program.optimize()
    _divide(program.model)
    return program.model


def _read_when_written(module: torch.nn.Module, model: onnx_ir.Model) -> None:
    """Puts weights that are read when their values are asked for in the place of the fake ones that were traced."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    for name, value in model.graph.initializers.items():
        weight = weights.get(name)
        if isinstance(weight, Lazy) and (fake := value.const_value) is not None:
            values = partial(_values, weight, name)
            value.const_value = onnx_ir.LazyTensor(values, fake.dtype, onnx_ir.Shape(weight.shape), name=name)


def _turn_when_written(model: onnx_ir.Model) -> None:
    """Takes weights with the Transpose that they go through: the optimizer would read all of them, and keep them."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "Transpose"]:
        weight, output = node.inputs[0], node.outputs[0]
        if weight is None or not weight.is_initializer() or len(weight.uses()) > 1 or output.is_graph_output():
            continue
        held, axes = weight.const_value, node.attributes.get_ints("perm")
        if held is None or axes is None:
            continue
        shape = onnx_ir.Shape([held.shape.numpy()[axis] for axis in axes])
        made = partial(_turned, held, axes)
        tensor = onnx_ir.LazyTensor(made, held.dtype, shape, name=output.name)
        turned = onnx_ir.Value(name=output.name, shape=shape, type=onnx_ir.TensorType(held.dtype), const_value=tensor)
        output.replace_all_uses_with(turned)
        graph.remove(node, safe=True)
        graph.initializers.pop(str(weight.name))
        graph.register_initializer(turned)


def _turned(weight: onnx_ir.TensorProtocol, axes: Sequence[int]) -> onnx_ir.TensorProtocol:
    return onnx_ir.tensor(weight.numpy().transpose(axes))


def _values(weight: Lazy, name: str) -> onnx_ir.TensorProtocol:
    return onnx_ir.tensor(read([weight])[0].detach().numpy(), name=name)


def _divide(model: onnx_ir.Model) -> None:
    """Writes x * (1 / r) as x / r: by this division ONNX Runtime knows the norms of language models, and fuses them."""
    for node in model.graph:
        if node.op_type != "Reciprocal":
            continue
        (inverse,), (root,) = node.outputs, node.inputs
        for product, place in tuple(inverse.uses()):
            if product.op_type == "Mul":
                factor = product.inputs[1 - place]
                product.op_type = "Div"
                product.replace_input_with(0, factor)
                product.replace_input_with(1, root)
        if not inverse.uses() and not inverse.is_graph_output():
            model.graph.remove(node, safe=True)


def _by_torchscript(graph: Graph, opset: int) -> onnx_ir.Model:
    axes: dict[str, Mapping[int, str]] = {port.name: dict(port.axes) for port in graph.inputs}
    axes |= {name: dict(axis) for name, axis in graph.outputs.items()}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "graph.onnx"  # a file: above 2 GB this exporter puts the weights beside it
        with _Writable():
            torch.onnx.export(
                graph.module,
                graph.samples,
                str(path),
                dynamo=False,
                input_names=[port.name for port in graph.inputs],
                output_names=list(graph.outputs),
                dynamic_axes={name: axis for name, axis in axes.items() if axis},
                opset_version=min(opset, 20),  # the newest this exporter knows
            )
        model = onnx_ir.load(path)
        onnx_ir.external_data.load_to_model(model)
    return model


REPEATS = (torch.repeat_interleave, Tensor.repeat_interleave)
ANTIALIASED = {"mode": "bilinear", "antialias": True}.items()


class _Writable(TorchFunctionMode):
    """What TorchScript's exporter writes wrong or not at all, said in another way.

    Masks of attention become numbers of the queries' dtype: boolean ones are written in fp32. Keys and values that
    several heads share are written for each of them. What is repeated along the last axis is stacked. An antialiased
    image is the image between two matrices. What is filled with a number gets its dtype.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        if func is F.scaled_dot_product_attention and mask is not None and mask.dtype == torch.bool:
            dtype = args[0].dtype
            added = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            kwargs = {**kwargs, "attn_mask": added}
        if func is F.scaled_dot_product_attention and kwargs.get("enable_gqa"):
            query, keys, values, *rest = args
            shared = (torch.stack([one] * (query.shape[1] // one.shape[1]), 2).flatten(1, 2) for one in (keys, values))
            args, kwargs = (query, *shared, *rest), {**kwargs, "enable_gqa": False}
        if func is F.interpolate and kwargs.items() >= ANTIALIASED and isinstance(kwargs.get("size"), tuple):
            return _antialiased(args[0], *kwargs["size"])
        if func is torch.full and "dtype" not in kwargs:
            kwargs = {**kwargs, "dtype": torch.as_tensor(kwargs["fill_value"] if len(args) < 2 else args[1]).dtype}
        if func in REPEATS and len(args) == 2 and isinstance(args[1], int) and kwargs == {"dim": -1}:
            return torch.stack([args[0]] * args[1], dim=-1).flatten(-2)
        return func(*args, **kwargs)


def _antialiased(image: Tensor, height: int, width: int) -> Tensor:
    """[B, C, H, W] at another size, as `F.interpolate(mode="bilinear", antialias=True, align_corners=False)`."""
    rows, columns = (_blending(int(old), int(new)) for old, new in zip(image.shape[2:], (height, width), strict=True))
    return rows.to(image.dtype) @ image @ columns.T.to(image.dtype)


def _blending(old: int, new: int) -> Tensor:
    """[new, old]: what of the old places is in a new one, by their distance: a triangle as wide as two of the wider."""
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale
    weights = 1 - np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = weights.clip(min=0)
    return torch.from_numpy((weights / weights.sum(1, keepdims=True)).astype(np.float32))


WRITTEN_BY = {DYNAMO: _by_dynamo, TORCHSCRIPT: _by_torchscript}


def _name_shapes(graph: Graph, model: onnx_ir.Model) -> None:
    """States every input's and output's shape with our names: exporters write sums of symbols and made-up ones."""
    inputs = {port.name: (port.sample.shape, port.axes) for port in graph.inputs}
    found = zip(output_shapes(graph.module, graph.samples), graph.outputs.values(), strict=True)
    outputs = dict(zip(graph.outputs, found, strict=True))
    for values, known in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value in values:
            shape, axes = known[value.name or ""]
            value.shape = onnx_ir.Shape([axes.get(axis, size) for axis, size in enumerate(shape)])
