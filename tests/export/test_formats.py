"""Other files than fp32 ONNX: fp16, int8, fused operators, weights apart, TorchScript, torch.export."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from exports import cut_model, export_tiny, quality_of, random_feeds, shallow_model, tiny_samples
from torch import nn

from slimvlm.compress.errors import CheckFailedError, UnsupportedModelError
from slimvlm.export import verify
from slimvlm.export.checks.parity import Case, measure
from slimvlm.export.checks.reference import first_batch, graph_ports, torch_runner
from slimvlm.export.graphs import vision
from slimvlm.export.graphs.build import build_graphs
from slimvlm.export.graphs.graph import BATCH, Graph, Port
from slimvlm.export.options import EXTERNAL_BYTES, ExportOptions
from slimvlm.export.running.runners import SessionRunner, TorchRunner, load_module
from slimvlm.export.variants import VARIANTS
from slimvlm.export.writers.onnx_rewriting import fuse
from slimvlm.export.writers.onnx_writer import write_onnx, write_variant
from slimvlm.export.writers.torch_writer import write_pt2


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
    runner = SessionRunner({"decoder": result.out / decoder.file})
    session = runner.session("decoder")
    dtypes = {port.name: port.type for port in (*session.get_inputs(), *session.get_outputs())}
    assert dtypes["past_key_values.0.key"] == dtypes["present.0.key"] == "tensor(float16)"
    assert dtypes["inputs_embeds"] == dtypes["logits"] == "tensor(float)"
    assert min(difference["cosine"] for difference in decoder.parity) > 0.999
    [check] = result.manifest.checks
    assert check["divergence"] < 0.001


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_whole_answers_of_programs_compiled_ahead_of_time_are_those_of_torch(tmp_path):
    result = export_tiny("llava", tmp_path / "export", shallow_model, formats=("pt2",), aoti=True)
    artifacts = [artifact for artifact in result.manifest.artifacts if artifact.format == "aoti"]
    assert len(artifacts) == 3
    assert all(difference["max_relative"] < 1e-5 for artifact in artifacts for difference in artifact.parity)
    [check] = [check for check in result.manifest.checks if check["format"] == "aoti"]
    assert check["equal"] == check["samples"] == 5
    [again] = [check for check in verify(result.out).checks if check["format"] == "aoti"]
    assert again["token_share"] == 1.0
    for backend in ("pt2", "aoti"):
        assert len(quality_of(result.out, "llava", backend, tiny_samples(2)).rows) == 2


SIZES = ((1, 7, 0), (3, 1, 5), (2, 3, 4))  # batch, new tokens, tokens before


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """The decoder of a cut LLaVA and its file by the dynamo exporter."""
    graph = graphs_of(*cut_model("llava"))["decoder_model_merged"]
    path = tmp_path_factory.mktemp("dynamo") / "decoder_model_merged.onnx"
    assert write_onnx(graph, path, ExportOptions()).exporter == "dynamo"
    return graph, path


def difference_at_other_sizes(graph, runner):
    """Largest error relative to the largest output of torch, and smallest cosine."""
    torch_says, worst, cosine = torch_runner([graph]), 0.0, 1.0
    for batch, tokens, past in SIZES:
        feeds = random_feeds(graph, batch_size=batch, sequence_length=tokens, past_sequence_length=past)
        case = Case(graph.name, "", feeds, torch_says.run(graph.name, feeds))
        found = measure(case, runner.run(graph.name, feeds))
        worst, cosine = max(worst, found.max_relative), min(cosine, found.cosine)
    return worst, cosine


def test_the_dynamo_graph_equals_torch_at_other_sizes(decoder):
    graph, path = decoder
    assert difference_at_other_sizes(graph, SessionRunner({graph.name: path}))[0] < 1e-5


def test_a_graph_names_no_line_of_code_and_no_path_of_the_machine_it_was_written_on(decoder):
    _, path = decoder
    assert not [said for said in (b"site-packages", b"stack_trace", b".py") if said in path.read_bytes()]


def test_the_runtime_fuses_the_norms_of_a_dynamo_graph(decoder, tmp_path):
    _, path = decoder
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("SimplifiedLayerNormalization") + kinds.count("SkipSimplifiedLayerNormalization") == 5
    assert "Pow" not in kinds


def test_fused_operators_give_the_same_numbers_and_can_be_quantized(decoder, tmp_path):
    graph, path = decoder
    fused = onnx_ir.load(path)
    fuse(fused, "cpu")
    assert any(node.domain == "com.microsoft" for node in fused.graph)
    for name in ("fp32", "int8"):
        write_variant(fused, tmp_path / f"{name}.onnx", VARIANTS[name], EXTERNAL_BYTES)
    assert difference_at_other_sizes(graph, SessionRunner({graph.name: tmp_path / "fp32.onnx"}))[0] < 1e-5
    assert difference_at_other_sizes(graph, SessionRunner({graph.name: tmp_path / "int8.onnx"}))[1] > 0.98


def test_int8_finds_the_matrices_of_a_dynamo_graph(decoder, tmp_path):
    graph, path = decoder
    write_variant(onnx_ir.load(path), tmp_path / "int8.onnx", VARIANTS["int8"], EXTERNAL_BYTES)
    weights = onnx.load(tmp_path / "int8.onnx").graph.initializer
    floats = [weight.name for weight in weights if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) == 2]
    assert [name for name in floats if "proj" in name or "lm_head" in name] == []
    assert difference_at_other_sizes(graph, SessionRunner({graph.name: tmp_path / "int8.onnx"}))[1] > 0.98


def test_a_torch_export_program_equals_torch_at_other_sizes(decoder, tmp_path):
    graph, _ = decoder
    write_pt2(graph, tmp_path / "decoder.pt2", aoti=False)
    ports, outputs = {graph.name: graph_ports(graph)}, {graph.name: tuple(graph.outputs)}
    runner = TorchRunner({graph.name: load_module("pt2", tmp_path / "decoder.pt2")}, ports, outputs)
    assert difference_at_other_sizes(graph, runner)[0] < 1e-5


@pytest.mark.parametrize("opset", (18, 21, 23))
def test_the_opset_is_the_asked_one(tmp_path, opset):
    graph = graphs_of(*cut_model("llava"))["embed_tokens"]
    written = write_onnx(graph, tmp_path / "embed.onnx", ExportOptions(opset=opset, exporter="dynamo"))
    assert written.opset == opset
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "embed.onnx").opset_import}[""] == opset


def test_the_dynamo_exporter_comes_first_and_the_other_where_it_fails(tmp_path):
    """A module whose branch depends on a value: torch.export refuses it, a trace takes the branch it saw."""

    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    graph = graph_of(Branch())
    written = write_onnx(graph, tmp_path / "branch.onnx", ExportOptions())
    assert written.exporter == "torchscript"
    assert written.fallback_reason.startswith("dynamo: ")
    with pytest.raises(UnsupportedModelError, match="vision_encoder cannot be exported to ONNX"):
        write_onnx(graph, tmp_path / "branch.onnx", ExportOptions(exporter="dynamo"))


@torch.no_grad()
@pytest.mark.parametrize("side", (3, 4, 9))
def test_what_the_torchscript_exporter_does_not_know_is_written_in_another_way(tmp_path, side):
    """An antialiased image, keys that two heads share, and a number that is to be an integer."""

    class Unknown(nn.Module):
        def forward(self, x):
            image = x.view(-1, 1, 4, 6)
            seen = F.interpolate(image, size=(side, 5), mode="bilinear", antialias=True).flatten(1)
            shared = torch.cat([image, -image], dim=1)
            attended = F.scaled_dot_product_attention(image.expand(-1, 4, -1, -1), shared, shared, enable_gqa=True)
            return torch.cat([seen + F.embedding(torch.full((1,), 1), seen), attended.flatten(1)], dim=1)

    values, module = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), Unknown()
    graph = Graph("vision_encoder", module, (Port("x", values[:2], {0: BATCH}),), {"y": {0: BATCH}})
    write_onnx(graph, tmp_path / "unknown.onnx", ExportOptions(exporter="torchscript"))
    runner = SessionRunner({"vision_encoder": tmp_path / "unknown.onnx"})
    found = runner.run("vision_encoder", {"x": values.numpy()})["y"]
    assert np.allclose(found, module(values).numpy(), rtol=1e-4, atol=1e-5)


def test_an_axis_that_the_exporter_fixed_is_refused(tmp_path):
    """`flatten` of a fixed list: the trace bakes the batch of two in, which the shape of the saved graph shows."""

    class Listed(nn.Module):
        def forward(self, x):
            return torch.stack([row * 2 for row in x])

    graph = graph_of(Listed())
    with pytest.raises(UnsupportedModelError, match="dynamo"):
        write_onnx(graph, tmp_path / "listed.onnx", ExportOptions(exporter="dynamo"))


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


def graphs_of(model, collator):
    """By name."""
    graphs = build_graphs(model, collator.family, first_batch(collator, tiny_samples(2)))
    return {graph.name: graph for graph in graphs}


def graph_of(module):
    """One input [B, 3], one output [B, ...]."""
    return Graph("vision_encoder", module.eval(), (Port("x", torch.ones(2, 3), {0: BATCH}),), {"y": {0: BATCH}})
