"""One graph -> one `.onnx` file: the dynamo exporter first, the TorchScript-based one where that fails.

An exporter may silently fix an axis that was asked to vary; the saved graph is looked at, and such a graph is refused.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
import torch.nn.functional as F
from onnx_ir import ExternalTensor
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.export.graphs.graph import Graph
from slimvlm.export.options import DYNAMO, TORCHSCRIPT, ExportOptions
from slimvlm.export.running.quiet import quiet
from slimvlm.export.writers.tracing import exported_program, first_line

INSIDE_BYTES = 256  # smaller weights stand in the graph


@dataclass(frozen=True, slots=True)
class Written:
    """How a graph was written: exporter, opset, and why the first exporter was not used, if so."""

    exporter: str
    opset: int
    fallback_reason: str | None = None


def write_onnx(graph: Graph, path: Path, options: ExportOptions) -> Written:
    """Writes `path`, and `path` with suffix `.onnx_data` beside it where the weights exceed the threshold.

    Raises:
        UnsupportedModelError: no exporter gives this graph with all its axes.
        OSError: the file cannot be written.
    """
    wanted = (DYNAMO, TORCHSCRIPT) if options.exporter == "auto" else (options.exporter,)
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
        save_onnx(model, path, options.external_bytes)
        return Written(exporter, model.opset_imports[""], "; ".join(failures) or None)
    raise UnsupportedModelError(f"{graph.name} cannot be exported to ONNX ({'; '.join(failures)})")


def save_onnx(model: onnx_ir.Model, path: Path, external_bytes: int) -> None:
    """Saves a model, with its weights in `<name>.onnx_data` beside it (the name transformers.js expects) if large.

    Of a weight only the tensor is written, not its shape a second time: int8 transposes weights and then finds the
    second one wrong. Weights that are in another file already stay there. What the exporter notes of every operator
    (lines of code, paths of this machine) is left out: in a small model it is as large as the int8 weights of a layer.
    """
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.shape = value.type = None
        value.metadata_props.clear()
    own = [value for value in model.graph.initializers.values() if not isinstance(value.const_value, ExternalTensor)]
    large = [value for value in own if value.const_value is not None and value.const_value.nbytes > INSIDE_BYTES]
    tensors = [value.const_value for value in large if value.const_value is not None]
    if tensors and sum(tensor.nbytes for tensor in tensors) >= external_bytes:
        beside = onnx_ir.external_data.convert_tensors_to_external(tensors, path.parent, data_name(path))
        for value, tensor in zip(large, beside, strict=True):
            value.const_value = tensor
    onnx_ir.save(model, path)


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
    )
    if program is None:
        raise ValueError("the exporter gave nothing")
    _divide(program.model)
    return program.model


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
    inputs = {port.name: (port.sample, port.axes) for port in graph.inputs}
    with torch.no_grad():
        results = graph.module(*graph.samples)
    results = (results,) if isinstance(results, Tensor) else results
    outputs = dict(zip(graph.outputs, zip(results, graph.outputs.values(), strict=True), strict=True))
    for values, known in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value in values:
            tensor, axes = known[value.name or ""]
            value.shape = onnx_ir.Shape([axes.get(axis, size) for axis, size in enumerate(tensor.shape)])
