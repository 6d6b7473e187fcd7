"""Weights in few bits: every block of a row has its own scale, found by rounding to nearest.

The operators are ONNX Runtime's own (MatMulNBits, GatherBlockQuantized), and so is what finds the scales. A weight is
rounded when it is written, so that one at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import onnx_ir

from slimvlm.compress.options import BLOCK
from slimvlm.export.running.quiet import quiet
from slimvlm.export.variants import Variant
from slimvlm.export.writers.onnx_writer import numbers

RUNTIME = "com.microsoft"  # domain of the operators
IN_INT8 = 4  # accuracy level of a product: ONNX Runtime rounds activations to 8 bits too, which is 2 to 50 times faster
PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}  # settings of a product that is nothing more


AT_ONCE = 2**22  # weights that are rounded at a time

Parts = tuple[np.ndarray, np.ndarray]  # codes [N, blocks, bytes], scales [N, blocks]


def quantize_weights(model: onnx_ir.Model, variant: Variant, _: Path) -> onnx_ir.Model:
    """The model, changed: its matrices and tables in `variant.bits` a weight, and convolutions in int8.

    Rows are filled up to whole blocks. What would take no less room stays as it is.
    """
    graph = model.graph
    rounder = Rounder(graph, variant.bits)
    graph.opset_imports.setdefault(RUNTIME, 1)
    for node in tuple(graph):
        if node.op_type in REWRITTEN and (made := REWRITTEN[node.op_type](rounder, node)):
            old, new = node.outputs[0], made[-1].outputs[0]
            new.name, new.shape, new.type = old.name, old.shape, old.type
            graph.insert_before(node, made)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    return model


class Rounder:
    """The weights of a graph in `bits`, as others of its weights: rounded when they are read.

    The last one that was rounded is kept: its codes are written, then its scales.
    """

    def __init__(self, graph: onnx_ir.Graph, bits: int) -> None:
        self.graph, self.bits = graph, bits
        self._rounded: Callable[..., Parts] = lru_cache(maxsize=1)(partial(_round, bits=bits))

    def parts(self, value: onnx_ir.Value, turned: bool, suffix: str = "") -> tuple[onnx_ir.Value, ...]:
        """Codes and scales of a matrix [K, N] or, `turned`, [N, K]; none where they are no smaller than it is.

        Args:
            suffix: of their names, for a table: its codes are [N, blocks * bytes].
        """
        weight = value.const_value
        assert weight is not None
        count, width = weight.shape.numpy() if turned else weight.shape.numpy()[::-1]
        blocks, each = -(-width // BLOCK), BLOCK * self.bits // 8
        if count * blocks * (each + weight.dtype.itemsize) >= weight.nbytes:
            return ()
        name = f"{value.name}_q{self.bits}"
        codes = (count, blocks * each) if suffix else (count, blocks, each)
        return (
            self._lazy(name + suffix, onnx_ir.DataType.UINT8, codes, lambda: self._rounded(weight, turned)[0]),
            self._lazy(
                f"{name}_scales{suffix}", weight.dtype, (count, blocks), lambda: self._rounded(weight, turned)[1]
            ),
        )

    def _lazy(
        self, name: str, dtype: onnx_ir.DataType, shape: tuple[int, ...], made: Callable[[], np.ndarray]
    ) -> onnx_ir.Value:
        tensor = onnx_ir.LazyTensor(
            lambda: onnx_ir.tensor(made().reshape(shape)), dtype, onnx_ir.Shape(shape), name=name
        )
        return _held(self.graph, tensor)


def _round(weight: onnx_ir.TensorProtocol, turned: bool, bits: int) -> Parts:
    """Some rows at a time, which is as if all were rounded together."""
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

    quantizer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=True, bits=bits))
    rows = numbers(weight) if turned else numbers(weight).T
    each = max(1, AT_ONCE // rows.shape[1])
    parts = (np.ascontiguousarray(rows[at : at + each].T) for at in range(0, len(rows), each))
    codes, scales, _ = zip(*(quantizer.qbits_block_quant(part) for part in parts), strict=True)
    return np.concatenate(codes), np.concatenate(scales)


def _product(rounder: Rounder, node: onnx_ir.Node) -> list[onnx_ir.Node]:
    """By a matrix [K, N] or, where it is turned, [N, K]; its bias [N] goes along."""
    given, weight, *bias = node.inputs
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    turned = settings.pop("transB", 0) == 1
    sizes = _sizes(weight)
    if weight is None or len(sizes) != 2 or any(PLAIN[setting] != value for setting, value in settings.items()):
        return []
    count, width = sizes if turned else sizes[::-1]
    parts = rounder.parts(weight, turned)
    if not parts or any(_sizes(added) != (count,) for added in bias):
        return []
    unused = [None, None] if bias else []  # points of zero, an order of groups
    settings = {"K": width, "N": count, "bits": rounder.bits, "block_size": BLOCK, "accuracy_level": IN_INT8}
    return [onnx_ir.node("MatMulNBits", [given, *parts, *unused, *bias], settings, domain=RUNTIME)]


def _lookup(rounder: Rounder, node: onnx_ir.Node) -> list[onnx_ir.Node]:
    """Of rows of a table [V, C]; what fills them up is cut off again."""
    table, axis = node.inputs[0], node.attributes.get("axis")
    sizes = _sizes(table)
    if table is None or len(sizes) != 2 or (axis is not None and axis.value != 0):
        return []
    parts = rounder.parts(table, True, "_rows")
    if not parts:
        return []
    codes, scales = parts
    settings = {"bits": rounder.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    rows = onnx_ir.node("GatherBlockQuantized", [codes, node.inputs[1], scales], settings, domain=RUNTIME)
    width = sizes[1]
    if width % BLOCK == 0:
        return [rows]
    bounds = {"start": 0, "end": width, "axis": -1}
    cut = [
        _held(rounder.graph, onnx_ir.tensor(np.array([at]), name=f"{table.name}_{bound}"))
        for bound, at in bounds.items()
    ]
    return [rows, onnx_ir.node("Slice", [rows.outputs[0], *cut])]


def _convolution(rounder: Rounder, node: onnx_ir.Node) -> list[onnx_ir.Node]:
    """With a kernel [out, in, ...] in int8, a scale for every output; it is made floats again before it is used."""
    given, weight, *bias = node.inputs
    if weight is None or weight.const_value is None or not _sizes(weight) or 0 in _sizes(weight):
        return []
    kernel = numbers(weight.const_value)
    largest = np.abs(kernel).max(axis=tuple(range(1, kernel.ndim)), keepdims=True)
    scales = np.where(largest > 0, largest, 1) / 127
    parts: dict[str, np.ndarray] = {"int8": np.round(kernel / scales).astype(np.int8), "scales": scales.ravel()}
    made = [_held(rounder.graph, onnx_ir.tensor(part, name=f"{weight.name}_{name}")) for name, part in parts.items()]
    floats = onnx_ir.node("DequantizeLinear", made, {"axis": 0})
    return [floats, onnx_ir.node("Conv", [given, floats.outputs[0], *bias], node.attributes)]


REWRITTEN = {"MatMul": _product, "Gemm": _product, "Gather": _lookup, "Conv": _convolution}


def _sizes(value: onnx_ir.Value | None) -> tuple[int, ...]:
    """The shape of a weight in floats; of anything else none."""
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return () if tensor is None or not tensor.dtype.is_floating_point() else tuple(tensor.shape.numpy())


def _held(graph: onnx_ir.Graph, tensor: onnx_ir.TensorProtocol) -> onnx_ir.Value:
    """A weight of the graph, which is there once."""
    name = str(tensor.name)
    if name not in graph.initializers:
        graph.register_initializer(onnx_ir.Value(name=name, const_value=tensor))
    return graph.initializers[name]
