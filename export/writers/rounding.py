"""How far the weights of a rounded graph are from those of the graph that it was made of.

What rounding costs in answers grows with the depth of a model, and with values that only tokens without a meaning have.
That every weight is where its scale has room for it can be said of any model, whatever it answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir

from slimvlm.compress.options import BLOCK
from slimvlm.export.variants import Variant
from slimvlm.export.writers.onnx_writer import numbers

WITHIN = 1.05  # steps: half a one, or a whole on the side that has a code less, and what a scale in half precision adds
AT_ONCE = 2**22  # weights that are compared at a time

Weights = Mapping[str, onnx_ir.TensorProtocol]
Pair = tuple[np.ndarray, np.ndarray, int]  # weights that share a scale along the last axis, in full and rounded; bits


def largest_shift(full: onnx_ir.Model, target: Path, variant: Variant) -> float:
    """Largest distance of a weight in the file `target` from that in `full`, in steps of those it shares a scale with.

    A step is the largest of these weights over 2^(bits - 1). Infinite where a weight is missing.
    """
    written, worst = _weights(onnx_ir.load(target).graph), 0.0
    for name, rows, is_product in _rows(full.graph, written):
        for wanted, found, bits in _pairs(name, rows, written, variant.bits, is_product):
            step = np.abs(wanted).max(-1) / 2 ** (bits - 1)
            error = np.abs(found - wanted.astype(np.float32)).max(-1)
            steps = np.divide(error, step, out=np.where(error == 0, 0, np.inf), where=step > 0)
            worst = float(np.maximum(worst, steps.max(initial=0)))  # NaN stays
    return worst


def _weights(graph: onnx_ir.Graph) -> Weights:
    """The weights of a graph by name."""
    found = {name: value.const_value for name, value in graph.initializers.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _rows(graph: onnx_ir.Graph, written: Weights) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Every matrix, table or kernel that is not as it was: its name, rows (one per output), whether it multiplies."""
    weights = _weights(graph)
    for node in graph:
        at = 0 if node.op_type == "Gather" else 1
        value = node.inputs[at] if node.op_type in ("MatMul", "Gemm", "Gather", "Conv") else None
        name = "" if value is None else str(value.name)
        weight = weights.get(name)
        if weight is None or name in written or len(weight.shape) < 2 or not weight.dtype.is_floating_point():
            continue
        turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))
        yield name, numbers(weight).T if turned else numbers(weight), node.op_type in ("MatMul", "Gemm")


def _pairs(name: str, rows: np.ndarray, written: Weights, bits: int, is_product: bool) -> Iterator[Pair]:
    """Rows [N, ...] beside what became of them; infinitely far where that is not there."""
    suffix = "" if is_product else "_rows"
    if f"{name}_q{bits}{suffix}" in written:
        codes, scales = (numbers(written[f"{name}_q{bits}{part}{suffix}"]) for part in ("", "_scales"))
        yield from _blocks(rows, codes, scales, bits)
        return
    for codes_name, scale_name in (("_int8", "_scales"), ("_quantized", "_scale")):
        if name + codes_name in written:
            codes, scale = numbers(written[name + codes_name]), numbers(written[name + scale_name])
            point = written.get(f"{name}_zero_point")
            zero = np.zeros(1, np.int8) if point is None else numbers(point)
            groups = scale.size, -1
            codes, zero = (codes.T if is_product else codes).reshape(groups), zero.reshape(-1, 1)
            yield rows.reshape(groups), (codes.astype(np.float32) - zero) * scale.reshape(-1, 1), 8
            return
    yield np.ones(1), np.full(1, np.inf), bits


def _blocks(rows: np.ndarray, codes: np.ndarray, scales: np.ndarray, bits: int) -> Iterator[Pair]:
    """Of rows [N, K] parts [n, blocks, BLOCK]; codes are packed, the lowest first, around 2^(bits - 1)."""
    count, width = rows.shape
    blocks = -(-width // BLOCK)
    packed, scales = codes.reshape(count, -1), scales.reshape(count, blocks, 1).astype(np.float32)
    each = max(1, AT_ONCE // (blocks * BLOCK))
    for at in range(0, count, each):
        part = slice(at, at + each)
        wanted = np.pad(rows[part], ((0, 0), (0, blocks * BLOCK - width))).reshape(-1, blocks, BLOCK)
        unpacked = (packed[part, :, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & (2**bits - 1)
        found = (unpacked.reshape(wanted.shape).astype(np.float32) - 2 ** (bits - 1)) * scales[part]
        found.reshape(len(wanted), -1)[:, width:] = 0  # what fills a row up is multiplied by nothing
        yield wanted, found, bits
