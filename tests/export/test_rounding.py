"""A rounded graph that is not the model's is refused, however little its answers show of it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir
import pytest
import torch
from exports import export_tiny, shallow_model
from weights import WIDTHS, Weights

from slimvlm.compress.errors import CheckFailedError
from slimvlm.export.options import EXTERNAL_BYTES, ExportOptions
from slimvlm.export.variants import QUANTIZED, VARIANTS
from slimvlm.export.writers import weight_only
from slimvlm.export.writers.onnx_writer import save_onnx, write_onnx, write_variant
from slimvlm.export.writers.rounding import WITHIN, largest_shift


@pytest.fixture(scope="module", params=WIDTHS, ids=str)
def full(request, tmp_path_factory):
    """Every kind of weight in a graph as it was traced, for each dtype."""
    folder = tmp_path_factory.mktemp("full")
    for dtype in ("float32", "float16"):
        graph = Weights(*request.param).graph(getattr(torch, dtype))
        write_onnx(graph, folder / f"{dtype}.onnx", ExportOptions(exporter="torchscript"))
    return folder


def rounded(full: Path, name: str, to: Path) -> tuple[onnx_ir.Model, Path]:
    """The traced graph and the file that the variant's writer makes of it."""
    source = onnx_ir.load(full / f"{VARIANTS[name].dtype}.onnx")
    write_variant(source, to / "rounded.onnx", VARIANTS[name], EXTERNAL_BYTES)
    return source, to / "rounded.onnx"


def held(path: Path, *endings: str) -> list[str]:
    return [one.name for one in onnx.load(path).graph.initializer if one.name.endswith(endings)]


def change(model: onnx_ir.Model, name: str, made) -> onnx_ir.Model:
    """The first number of a weight of the graph."""
    numbers = model.graph.initializers[name].const_value.numpy().copy()
    numbers.reshape(-1)[:1] = made(numbers.reshape(-1)[:1])
    model.graph.initializers[name].const_value = onnx_ir.tensor(numbers, name=name)
    return model


def change_in(path: Path, name: str, made) -> None:
    """As `change`, in a file."""
    save_onnx(change(onnx_ir.load(path), name, made), path, EXTERNAL_BYTES)


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_scale_and_zero_point_counts(tmp_path, full, name):
    source, path = rounded(full, name, tmp_path)
    assert 0 < largest_shift(source, path, VARIANTS[name]) <= WITHIN
    right = path.read_bytes()
    scales, points = held(path, "_scale", "_scales", "_scales_rows"), held(path, "_zero_point")
    assert len(scales) == 3 + (name != "int8")  # two matrices, a table; a convolution, which int8 leaves alone
    for weight in scales:
        for made in (lambda scale: 2 * scale, lambda scale: 0 * scale):
            change_in(path, weight, made)
            assert largest_shift(source, path, VARIANTS[name]) > WITHIN, weight
            path.write_bytes(right)
    for weight in points:
        change_in(path, weight, lambda point: point + 30)
        assert largest_shift(source, path, VARIANTS[name]) > WITHIN, weight
        path.write_bytes(right)


def test_a_weight_that_is_not_there_is_infinitely_far(tmp_path, full):
    source, path = rounded(full, "q8", tmp_path)
    assert largest_shift(source, path, VARIANTS["q4"]) == float("inf")


def double(scale):
    return 2 * scale


def test_an_export_with_a_wrong_scale_is_refused(tmp_path, monkeypatch):
    """One scale of hundreds, of one graph: its answers hardly show it."""
    right = weight_only.quantize_weights

    def wrong(model: onnx_ir.Model, *more: object) -> onnx_ir.Model:
        made = right(model, *more)
        if any(value.name.startswith("past") for value in made.graph.inputs):  # the decoder
            return change(made, [name for name in made.graph.initializers if name.endswith("_scales")][-1], double)
        return made

    monkeypatch.setattr(weight_only, "quantize_weights", wrong)
    with pytest.raises(
        CheckFailedError, match=r"decoder\S* has weights .* steps of rounding from the model's"
    ) as found:
        export_tiny("llava", tmp_path / "out", shallow_model, samples=2, max_new_tokens=2, variants=("fp32", "q4"))
    assert [artifact.file for artifact in found.value.result.manifest.artifacts if not artifact.ok] == [
        "onnx/decoder_model_merged_q4.onnx"
    ]
