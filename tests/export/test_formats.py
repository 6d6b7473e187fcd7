"""Other files than fp32 ONNX: fp16, int8, fused operators, weights apart, TorchScript, torch.export."""

from __future__ import annotations

import shutil

import onnx
import pytest
import torch
from exports import cut_model, export_tiny, tiny_samples
from torch import nn

from slimvlm.compress.errors import CheckFailedError, UnsupportedModelError
from slimvlm.export import verify, vision
from slimvlm.export.graphs import BATCH, Graph, Port, build_graphs
from slimvlm.export.onnx_writer import write_onnx
from slimvlm.export.options import OnnxSettings
from slimvlm.export.reference import first_batch
from slimvlm.export.runners import OnnxRunner
from slimvlm.export.torch_writer import compiled_name, load_aoti, load_pt2, write_pt2


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """A cut LLaVA as fp32 and int8 ONNX, with its weights in files of their own, and as TorchScript."""
    out = tmp_path_factory.mktemp("variants") / "export"
    return export_tiny("llava", out, formats=("onnx", "torchscript"), quantize="int8", external_bytes=1000)


def test_torchscript_equals_torch_at_other_sizes_and_generates_its_tokens(variants):
    traced = [artifact for artifact in variants.manifest.artifacts if artifact.format == "torchscript"]
    assert len(traced) == 3
    assert all(difference["max_relative"] < 1e-5 for artifact in traced for difference in artifact.parity)
    [check] = [check for check in variants.manifest.checks if check["format"] == "torchscript"]
    assert check["equal"] == check["samples"]


def test_int8_graphs_hold_int8_matrices_and_keep_the_direction_of_every_output(variants):
    quantized = [artifact for artifact in variants.manifest.artifacts if artifact.variant == "int8"]
    assert len(quantized) == 3
    for artifact in quantized:
        assert min(difference["cosine"] for difference in artifact.parity) > 0.98
        weights = onnx.load(variants.out / artifact.file, load_external_data=False).graph.initializer
        kinds = {weight.data_type for weight in weights if len(weight.dims) == 2 and min(weight.dims) > 1}
        assert kinds & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


def test_weights_above_the_limit_stand_beside_their_graph(variants):
    data = variants.out / "onnx" / "decoder_model_merged.onnx_data"
    assert data.is_file()
    assert "onnx/decoder_model_merged.onnx_data" in variants.manifest.files
    graph = onnx.load(variants.out / "onnx" / "decoder_model_merged.onnx", load_external_data=False).graph
    assert any(weight.data_location == onnx.TensorProto.EXTERNAL for weight in graph.initializer)
    config = (variants.out / "config.json").read_text()
    assert "use_external_data_format" in config  # so that transformers.js loads both


def test_weights_apart_survive_a_move_of_the_folder(variants, tmp_path):
    moved = shutil.copytree(variants.out, tmp_path / "elsewhere")
    assert all(check["ok"] for check in verify(moved).checks)


def test_fp16_graphs_have_fp16_caches_and_fp32_outputs(tmp_path):
    result = export_tiny("llava", tmp_path / "export", dtype="fp16")
    decoder = next(artifact for artifact in result.manifest.artifacts if artifact.graph == "decoder_model_merged")
    assert decoder.file == "onnx/decoder_model_merged_fp16.onnx"
    runner = OnnxRunner({"decoder": result.out / decoder.file})
    dtypes = {port.name: port.dtype for port in (*runner.inputs("decoder"), *runner.outputs("decoder"))}
    assert dtypes["past_key_values.0.key"] == dtypes["present.0.key"] == "float16"
    assert dtypes["inputs_embeds"] == dtypes["logits"] == "float32"
    assert min(difference["cosine"] for difference in decoder.parity) > 0.999
    [check] = result.manifest.checks
    assert check["token_share"] >= 0.9


def test_fused_operators_give_the_same_answers(tmp_path):
    result = export_tiny("llava", tmp_path / "export", fuse="cpu", exporter="dynamo")
    assert all(artifact.fused_for == "cpu" for artifact in result.manifest.artifacts)
    assert result.manifest.checks[0]["equal"] == 5
    graphs = [onnx.load(result.out / artifact.file).graph for artifact in result.manifest.artifacts]
    assert any(node.domain == "com.microsoft" for graph in graphs for node in graph.node)


def test_torch_export_programs_equal_torch_at_other_sizes(tmp_path):
    result = export_tiny("llava", tmp_path / "export", formats=("pt2",))
    assert all(d["max_relative"] < 1e-5 for artifact in result.manifest.artifacts for d in artifact.parity)
    assert result.manifest.checks[0]["equal"] == 5


@pytest.mark.parametrize("opset", (18, 21, 23))
def test_the_opset_is_the_asked_one(tmp_path, opset):
    model, collator = cut_model("llava")
    graph = embed_graph(model, collator)
    written = write_onnx(graph, tmp_path / "embed.onnx", OnnxSettings(opset=opset, exporter="dynamo"))
    assert written.opset == opset
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "embed.onnx").opset_import}[""] == opset


def test_the_dynamo_exporter_comes_first_and_the_other_where_it_fails(tmp_path):
    """A module whose branch depends on a value: torch.export refuses it, a trace takes the branch it saw."""

    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    graph = graph_of(Branch())
    written = write_onnx(graph, tmp_path / "branch.onnx", OnnxSettings())
    assert written.exporter == "torchscript"
    assert written.fallback_reason.startswith("dynamo: ")
    with pytest.raises(UnsupportedModelError, match="vision_encoder cannot be exported to ONNX"):
        write_onnx(graph, tmp_path / "branch.onnx", OnnxSettings(exporter="dynamo"))


def test_an_axis_that_the_exporter_fixed_is_refused(tmp_path):
    """`flatten` of a fixed list: the trace bakes the batch of two in, which the shape of the saved graph shows."""

    class Listed(nn.Module):
        def forward(self, x):
            return torch.stack([row * 2 for row in x])

    graph = graph_of(Listed())
    with pytest.raises(UnsupportedModelError, match="dynamo"):
        write_onnx(graph, tmp_path / "listed.onnx", OnnxSettings(exporter="dynamo"))


def test_a_graph_that_is_wrong_at_another_size_fails_its_check_and_is_kept(tmp_path, monkeypatch):
    """Features that are right for the traced batch only: the files stay, marked, and the error carries the result."""

    class Fixed(vision.Select):
        def forward(self, pixel_values):
            features = super().forward(pixel_values)
            return features + torch.zeros(features.shape).sum() + int(features.shape[0])

    monkeypatch.setitem(vision.KINDS, "select", (lambda model, batch: Fixed(model), ("pixel_values",)))
    out = tmp_path / "export"
    with pytest.raises(CheckFailedError, match="vision_encoder.onnx differs from torch") as caught:
        export_tiny("llava", out)
    assert caught.value.exit_code == 4
    assert not caught.value.result.manifest.artifacts[0].ok
    assert (out / "onnx" / "vision_encoder.onnx").is_file()
    with pytest.raises(CheckFailedError):
        verify(out)


def embed_graph(model, collator):
    graphs = build_graphs(model, collator.family, first_batch(collator, tiny_samples(2)))
    return next(graph for graph in graphs if graph.name == "embed_tokens")


def graph_of(module):
    """One input [B, 3], one output [B, ...]."""
    return Graph("vision_encoder", module.eval(), (Port("x", torch.ones(2, 3), {0: BATCH}),), {"y": {0: BATCH}})


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_program_compiled_ahead_of_time_gives_the_same_at_another_size(tmp_path):
    graph = graph_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    write_pt2(graph, tmp_path / "linear.pt2", aoti=True)
    rows = torch.randn(5, 3)
    for load, path in ((load_pt2, tmp_path / "linear.pt2"), (load_aoti, compiled_name(tmp_path / "linear.pt2"))):
        with torch.no_grad():
            assert torch.allclose(load(path)(rows), graph.module(rows), atol=1e-6)
