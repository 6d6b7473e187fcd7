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

WITHIN = 1.05  # steps: half a one, or a whole on the side that has a code less, and what a scale in half precision adds
AT_ONCE = 2**22  # weights that are compared at a time

Numbers = Mapping[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray, int]  # weights that share a scale along the last axis, in full and rounded; bits


def largest_shift(source: Path, target: Path, variant: Variant) -> float:
    """Largest distance of a weight in `target` from that in `source`, in steps of those that it shares a scale with.

    A step is the largest of these weights over 2^(bits - 1). Infinite where a weight is missing.
    """
    full, worst = onnx_ir.load(source).graph, 0.0
    written = _numbers(onnx_ir.load(target).graph)
    for name, rows, is_product in _rows(full):
        if name in written:
            continue  # as it was
        for wanted, found, bits in _pairs(name, rows, written, variant.bits, is_product):
            step = np.abs(wanted).max(-1) / 2 ** (bits - 1)
            error = np.abs(found - wanted.astype(np.float32)).max(-1)
            steps = np.divide(error, step, out=np.where(error == 0, 0, np.inf), where=step > 0)
            worst = float(np.maximum(worst, steps.max(initial=0)))  # NaN stays
    return worst


def _numbers(graph: onnx_ir.Graph) -> Numbers:
    """The weights of a graph by name."""
    found = {name: value.const_value for name, value in graph.initializers.items()}
    return {name: tensor.numpy() for name, tensor in found.items() if tensor is not None}


def _rows(graph: onnx_ir.Graph) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Every weight of a matrix, a table or a convolution: its name, rows (one per output), whether it multiplies."""
    weights = _numbers(graph)
    for node in graph:
        at = 0 if node.op_type == "Gather" else 1
        value = node.inputs[at] if node.op_type in ("MatMul", "Gemm", "Gather", "Conv") else None
        weight = weights.get(str(value.name)) if value is not None else None
        if weight is None or weight.ndim < 2 or not np.issubdtype(weight.dtype, np.floating):
            continue
        turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))
        yield str(value.name), weight.T if turned else weight, node.op_type in ("MatMul", "Gemm")  # type: ignore[union-attr]


def _pairs(name: str, rows: np.ndarray, written: Numbers, bits: int, is_product: bool) -> Iterator[Pair]:
    """Rows [N, ...] beside what became of them; infinitely far where that is not there."""
    suffix = "" if is_product else "_rows"
    if (codes := written.get(f"{name}_q{bits}{suffix}")) is not None:
        yield from _blocks(rows, codes, written[f"{name}_q{bits}_scales{suffix}"], bits)
        return
    for codes_name, scale_name in (("_int8", "_scales"), ("_quantized", "_scale")):
        if (codes := written.get(name + codes_name)) is not None:
            zero, scale = written.get(f"{name}_zero_point", np.zeros(1, np.int8)), written[name + scale_name]
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
