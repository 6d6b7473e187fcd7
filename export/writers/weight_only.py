"""Weights in few bits: every block of a row has its own scale, found by rounding to nearest.

The operators are ONNX Runtime's own (MatMulNBits, GatherBlockQuantized), and so is what finds the scales.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir

from slimvlm.compress.options import BLOCK
from slimvlm.export.running.quiet import quiet
from slimvlm.export.variants import Variant
from slimvlm.export.writers.onnx_writer import save_onnx

RUNTIME = "com.microsoft"  # domain of the operators
IN_INT8 = 4  # accuracy level of a product: ONNX Runtime rounds activations to 8 bits too, which is 2 to 50 times faster
PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}  # settings of a product that is nothing more


def quantize_weights(source: Path, target: Path, variant: Variant, external_bytes: int) -> None:
    """Writes `source` with matrices and tables in `variant.bits` a weight, and convolutions in int8.

    Rows are filled up to whole blocks. What would take no less room stays as it is.
    """
    model = onnx_ir.load(source)
    onnx_ir.external_data.load_to_model(model)
    graph = model.graph
    graph.opset_imports.setdefault(RUNTIME, 1)
    for node in tuple(graph):
        if node.op_type in REWRITTEN and (made := REWRITTEN[node.op_type](graph, node, variant.bits)):
            old, new = node.outputs[0], made[-1].outputs[0]
            new.name, new.shape, new.type = old.name, old.shape, old.type
            graph.insert_before(node, made)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    save_onnx(model, target, external_bytes)


def _product(graph: onnx_ir.Graph, node: onnx_ir.Node, bits: int) -> list[onnx_ir.Node]:
    """By a matrix [K, N] or, where it is turned, [N, K]; its bias [N] goes along."""
    given, weight, *bias = node.inputs
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    turned = settings.pop("transB", 0) == 1
    name, matrix = _weight(weight)
    if matrix.ndim != 2 or any(PLAIN[setting] != value for setting, value in settings.items()):
        return []
    rows = matrix if turned else matrix.T
    packed = _packed(rows, bits)
    if not packed or any(_weight(added)[1].shape != (len(rows),) for added in bias):
        return []
    parts = [_held(graph, f"{name}_{part}", numbers) for part, numbers in packed.items()]
    unused = [None, None] if bias else []  # points of zero, an order of groups
    sizes = {"K": rows.shape[1], "N": len(rows), "bits": bits, "block_size": BLOCK, "accuracy_level": IN_INT8}
    return [onnx_ir.node("MatMulNBits", [given, *parts, *unused, *bias], sizes, domain=RUNTIME)]


def _lookup(graph: onnx_ir.Graph, node: onnx_ir.Node, bits: int) -> list[onnx_ir.Node]:
    """Of rows of a table [V, C]; what fills them up is cut off again."""
    (name, table), axis = _weight(node.inputs[0]), node.attributes.get("axis")
    if table.ndim != 2 or (axis is not None and axis.value != 0) or not (packed := _packed(table, bits)):
        return []
    codes, scales = (
        _held(graph, f"{name}_{part}_rows", numbers.reshape(len(table), -1)) for part, numbers in packed.items()
    )
    sizes = {"bits": bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    rows = onnx_ir.node("GatherBlockQuantized", [codes, node.inputs[1], scales], sizes, domain=RUNTIME)
    width = table.shape[1]
    if width % BLOCK == 0:
        return [rows]
    bounds = {"start": 0, "end": width, "axis": -1}
    cut = [_held(graph, f"{name}_{bound}", np.array([at])) for bound, at in bounds.items()]
    return [rows, onnx_ir.node("Slice", [rows.outputs[0], *cut])]


def _convolution(graph: onnx_ir.Graph, node: onnx_ir.Node, _: int) -> list[onnx_ir.Node]:
    """With a kernel [out, in, ...] in int8, a scale for every output; it is made floats again before it is used."""
    given, weight, *bias = node.inputs
    name, kernel = _weight(weight)
    if kernel.size == 0:
        return []
    largest = np.abs(kernel).max(axis=tuple(range(1, kernel.ndim)), keepdims=True)
    scales = np.where(largest > 0, largest, 1) / 127
    codes = _held(graph, f"{name}_int8", np.round(kernel / scales).astype(np.int8))
    floats = onnx_ir.node("DequantizeLinear", [codes, _held(graph, f"{name}_scales", scales.ravel())], {"axis": 0})
    return [floats, onnx_ir.node("Conv", [given, floats.outputs[0], *bias], node.attributes)]


REWRITTEN = {"MatMul": _product, "Gemm": _product, "Gather": _lookup, "Conv": _convolution}


def _weight(value: onnx_ir.Value | None) -> tuple[str, np.ndarray]:
    """Name and numbers of a weight in floats; of anything else no numbers."""
    tensor = value.const_value if value is not None and value.is_initializer() else None
    if tensor is None or not tensor.dtype.is_floating_point():
        return "", np.empty(0)
    return str(tensor.name), tensor.numpy()


def _packed(rows: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Codes [N, blocks, bytes] and scales [N, blocks] of rows [N, K]; nothing where they are no smaller than these."""
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

    quantizer = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=True, bits=bits))
    codes, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(rows.T))
    return {f"q{bits}": codes, f"q{bits}_scales": scales} if codes.nbytes + scales.nbytes < rows.nbytes else {}


def _held(graph: onnx_ir.Graph, name: str, numbers: np.ndarray) -> onnx_ir.Value:
    """A weight of the graph, which is there once."""
    if name not in graph.initializers:
        graph.register_initializer(onnx_ir.Value(name=name, const_value=onnx_ir.tensor(numbers, name=name)))
    return graph.initializers[name]
