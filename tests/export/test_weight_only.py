"""Weights in few bits: every weight is what it was, to a step of its block, whatever its matrix's width."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from weights import WIDTHS, Weights

from slimvlm.compress.options import BLOCK, ROUNDED
from slimvlm.compress.recovery.adapters.rounding import round_blocks
from slimvlm.export.options import EXTERNAL_BYTES, ExportOptions
from slimvlm.export.running.runners import SessionRunner
from slimvlm.export.variants import VARIANTS
from slimvlm.export.writers.onnx_writer import trace_onnx, write_variant


@pytest.mark.parametrize("width, count", WIDTHS)
@pytest.mark.parametrize(
    "variant", [row for row in VARIANTS.values() if "weight_only" in str(row.writer)], ids=lambda given: given.name
)
def test_every_weight_stays_within_a_step_of_its_block(tmp_path, variant, width, count):
    module, target = Weights(width, count), tmp_path / "few.onnx"
    graph = module.graph(getattr(torch, variant.dtype))
    traced = trace_onnx(graph, ExportOptions(exporter="torchscript")).model
    write_variant(traced, target, variant, EXTERNAL_BYTES)
    found = SessionRunner({"weights": target}).run("weights", {port.name: port.sample.numpy() for port in graph.inputs})
    wanted = {"flat": module.flat.weight, "deep": module.deep.weight, "table": module.table.weight}
    for name, weight in wanted.items():
        rows = weight.detach().float().numpy()
        assert (np.abs(found[name] - rows) <= steps(rows, variant.bits) + 1e-3).all(), name
    kernel = module.patches.weight.detach().float().numpy().reshape(count, -1)
    bias = module.patches.bias.detach().float().numpy()[:, None]
    assert np.abs(found["patches"] - bias - kernel).max() <= np.abs(kernel).max() / 127 + 1e-3
    kinds = {node.op_type for node in onnx.load(target).graph.node}
    assert kinds >= {"MatMulNBits", "GatherBlockQuantized", "DequantizeLinear"}
    assert not kinds & {"MatMul", "Gemm", "Gather"}


@pytest.mark.parametrize("width, count", WIDTHS)
@pytest.mark.parametrize("name", ROUNDED)
def test_a_recovery_rounds_weights_as_they_are_written(tmp_path, name, width, count):
    module, target = Weights(width, count), tmp_path / "few.onnx"
    graph = module.graph(torch.float32)
    traced = trace_onnx(graph, ExportOptions(exporter="torchscript")).model
    write_variant(traced, target, VARIANTS[name], EXTERNAL_BYTES)
    found = SessionRunner({"weights": target}).run("weights", {port.name: port.sample.numpy() for port in graph.inputs})
    for part in ("deep", "table"):
        wanted = round_blocks(getattr(module, part).weight.detach(), VARIANTS[name].bits).numpy()
        assert np.abs(found[part] - wanted).max() <= 1e-3 * np.abs(wanted).max(), part  # another code: at least 1 / 128


def steps(rows: np.ndarray, bits: int) -> np.ndarray:
    """For every weight the step of its block: the largest weight is the last code of its side."""
    sizes = [np.abs(rows[:, at : at + BLOCK]) for at in range(0, rows.shape[1], BLOCK)]
    return np.concatenate([np.broadcast_to(part.max(1, keepdims=True), part.shape) for part in sizes], 1) / 2 ** (
        bits - 1
    )


def test_what_would_not_get_smaller_stays_as_it_is(tmp_path):
    """A row of one number: its scale alone is as large."""
    graph = Weights(1, 7).graph(torch.float32)
    traced = trace_onnx(graph, ExportOptions(exporter="torchscript")).model
    write_variant(traced, tmp_path / "few.onnx", VARIANTS["q4"], EXTERNAL_BYTES)
    kinds = {node.op_type for node in onnx.load(tmp_path / "few.onnx").graph.node}
    assert not kinds & {"MatMulNBits", "GatherBlockQuantized"}
