"""A model that is not in memory is exported as one that is: the same files, and a weight at a time on the way."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from exports import cut_model, shallow_model, size_of, tiny_samples
from tiny_processors import tiny_processor
from torch import nn

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.checkpoint import load_model, stream_model
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.models.streaming.shards import Shard
from slimvlm.compress.models.streaming.weights import Holding
from slimvlm.export.checks.answers import retell
from slimvlm.export.checks.parity import measure
from slimvlm.export.checks.reference import first_batch, make_reference, torch_runner
from slimvlm.export.checks.verification import verify
from slimvlm.export.graphs.build import build_graphs
from slimvlm.export.graphs.graph import BATCH, Graph, Port
from slimvlm.export.job import export_checkpoint
from slimvlm.export.options import ExportOptions
from slimvlm.export.variants import VARIANTS
from slimvlm.export.writers.onnx_writer import trace_onnx, write_variant


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_streamed_export_is_checked_and_has_the_files_of_a_loaded_one(tmp_path):
    """Cast and rounded, with weights beside the graphs."""
    model, _ = shallow_model("llava")
    save_checkpoint(tmp_path / "model", model, tiny_processor("llava"), None)
    for stream in ("on", "off"):
        options = ExportOptions(
            stream=stream, exporter="dynamo", samples=2, variants=("fp16", "q4f16"), external_bytes=1000
        )
        manifest = export_checkpoint(tmp_path / "model", tmp_path / stream, options).manifest
        assert not manifest.failures
        assert all(artifact.parity for artifact in manifest.artifacts)
        assert [check["forced"] for check in manifest.checks] == [stream == "on"] * 2
        assert [check["ok"] for check in verify(tmp_path / stream).checks] == [True] * 2
    found, wanted = (files_of(tmp_path / stream / "onnx") for stream in ("on", "off"))
    assert len([name for name in found if name.endswith("_data")]) >= 4
    assert found == wanted
    assert files_of(tmp_path / "on").keys() == files_of(tmp_path / "off").keys()


READINGS = {  # of a block of every tower, where it is not once for images and twice for text
    "mistral3": [{2}, {3}],  # two images go through the tower one after the other
    "clip": [{1}, {1}],
    "blip2_t5": [{1}, {1}, {2, 5}],  # the encoder's graph computes the cross attention's keys and values
}


@pytest.mark.parametrize("name", ("llava", "qwen2_5_vl", "paligemma", "blip2_opt", "blip2_t5", "mistral3", "clip"))
def test_torch_says_along_given_answers_what_a_loaded_model_does_step_by_step_and_reads_a_block_twice(
    tmp_path, monkeypatch, name
):
    """Questions of different lengths, left-padded there and in one forward here; answers with and without their end."""
    model, collator = cut_model(name)
    save_checkpoint(tmp_path / "model", model, None, None)
    samples, read, inner = tiny_samples(5, size_of(name)), Counter(), Shard.tensor
    loaded = load_model(tmp_path / "model", dtype=torch.float32).model
    streamed = stream_model(tmp_path / "model", dtype=torch.float32, holding=Holding(tables=False)).model
    of_loaded, of_streamed = (
        build_graphs(one, collator.family, first_batch(collator, samples)) for one in (loaded, streamed)
    )
    monkeypatch.setattr(Shard, "tensor", lambda self, weight: read.update([weight]) or inner(self, weight))
    given = make_reference(streamed, collator, of_streamed, samples, 2)
    assert (len(given.answers), len(given.tokens), given.forced) == ((0, 0, False) if name == "clip" else (3, 5, True))
    for answers in given.answers:
        told = retell(torch_runner(of_loaded), given.prompting, answers, name)
        assert told.difference.max_relative < 1e-5
        assert list(map(len, told.choices)) == list(map(len, answers.chosen(given.prompting.end)))
    for case in given.cases:
        assert measure(case, torch_runner(of_loaded).run(case.graph, case.feeds)).max_relative < 1e-5
    prefixes = [f"{tower.blocks}.0." for tower in collator.family.towers]
    found = [{times for weight, times in read.items() if weight.startswith(prefix)} for prefix in prefixes]
    assert found == READINGS.get(name, [{1}, {2}])


@pytest.mark.parametrize("asked", ({"formats": ("onnx", "torchscript")}, {"exporter": "torchscript"}, {"fuse": "cpu"}))
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
