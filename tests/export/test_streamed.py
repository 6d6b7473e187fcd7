"""A model that is not in memory is exported as one that is: the same files, and a weight at a time on the way."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from exports import shallow_model, size_of, tiny_samples
from tiny_processors import tiny_processor
from torch import nn

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.checkpoint import load_model, stream_model
from slimvlm.compress.models.computing import cast
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.export.checks.reference import first_batch
from slimvlm.export.graphs.build import build_graphs
from slimvlm.export.graphs.graph import BATCH, Graph, Port
from slimvlm.export.job import export_checkpoint
from slimvlm.export.options import ExportOptions
from slimvlm.export.variants import VARIANTS
from slimvlm.export.writers.onnx_writer import trace_onnx, write_variant


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_graphs_of_a_streamed_model_are_byte_for_byte_those_of_one_in_memory(tmp_path):
    """Cast and rounded, with weights beside them."""
    model, collator = shallow_model("llava")
    save_checkpoint(tmp_path / "model", model, None, None)
    batch = first_batch(collator, tiny_samples(2, size_of("llava")))
    for load in (load_model, stream_model):
        loaded = cast(load(tmp_path / "model", dtype=torch.float32).model, torch.float16)
        (tmp_path / load.__name__).mkdir()
        for graph in build_graphs(loaded, collator.family, batch)[1:]:
            traced = trace_onnx(graph, ExportOptions(exporter="dynamo")).model
            for variant in VARIANTS.values():
                if variant.dtype == "float16":
                    path = tmp_path / load.__name__ / f"{graph.name}{variant.suffix}.onnx"
                    write_variant(traced, path, variant, external_bytes=1000)
    found, wanted = (files_of(tmp_path / load.__name__) for load in (stream_model, load_model))
    assert len([name for name in found if name.endswith("_data")]) >= 4
    assert found == wanted


def test_a_streamed_export_is_checked_and_has_the_files_of_a_loaded_one(tmp_path):
    model, _ = shallow_model("clip")
    save_checkpoint(tmp_path / "model", model, tiny_processor("clip"), None)
    for stream in ("on", "off"):
        options = ExportOptions(
            stream=stream, exporter="dynamo", samples=2, variants=("fp32", "q8"), external_bytes=1000
        )
        manifest = export_checkpoint(tmp_path / "model", tmp_path / stream, options).manifest
        assert not manifest.failures
        assert all(artifact.parity for artifact in manifest.artifacts)
    assert files_of(tmp_path / "on").keys() == files_of(tmp_path / "off").keys()
    assert files_of(tmp_path / "on" / "onnx") == files_of(tmp_path / "off" / "onnx")


@pytest.mark.parametrize("asked", ({"formats": ("onnx", "torchscript")}, {"exporter": "torchscript"}))
def test_what_is_made_of_all_weights_in_memory_is_refused_of_a_streamed_model(tmp_path, asked):
    save_checkpoint(tmp_path / "model", shallow_model("clip")[0], None, None)
    with pytest.raises(UnsuitableOptionError, match="--stream on writes ONNX graphs by the dynamo exporter"):
        export_checkpoint(tmp_path / "model", tmp_path / "out", ExportOptions(stream="on", **asked))


@pytest.mark.parametrize("name", ("fp32", "q4"))
def test_a_weight_at_a_time_is_in_memory_while_graphs_are_written(tmp_path, name):
    width, layers = 512, 24
    graph = Graph(
        "deep",
        nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).eval(),
        (Port("x", torch.zeros(2, width), {0: BATCH}),),
        {"y": {0: BATCH}},
    )
    traced = trace_onnx(graph, ExportOptions(exporter="dynamo")).model
    write_variant(traced, tmp_path / "first.onnx", VARIANTS[name], external_bytes=1000)  # imports what it needs
    tracemalloc.start()
    write_variant(traced, tmp_path / "graph.onnx", VARIANTS[name], external_bytes=1000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * np.dtype("float32").itemsize * width**2
    assert (tmp_path / "graph.onnx_data").stat().st_size > layers * width**2 / 2
