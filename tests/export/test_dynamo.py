"""The exporters that follow a module's code, which takes seconds: the graphs of every family are the model."""

import numpy as np
import pytest
import torch
from exports import random_feeds, shallow_model, size_of, tiny_samples
from tiny_models import FACTORIES
from torch import nn

from slimvlm.compress.models.checkpoint import stream_model
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.export.checks.parity import Case, measure
from slimvlm.export.checks.reference import first_batch, graph_ports, torch_runner
from slimvlm.export.graphs.build import build_graphs
from slimvlm.export.graphs.graph import BATCH, PAST, ROWS, SEQUENCE, TOTAL, Graph, Port
from slimvlm.export.graphs.masks import causal_mask
from slimvlm.export.graphs.windows import CHUNKED, EVERYTHING, SLIDING, Reach
from slimvlm.export.options import ExportOptions
from slimvlm.export.running.runners import SessionRunner, TorchRunner, load_module
from slimvlm.export.writers.onnx_writer import write_onnx
from slimvlm.export.writers.torch_writer import write_pt2

TORCH_LIKE = 1e-5  # relative error of what is only written differently
# One family of every kind of language model: the other decoders are the same modules.
DECODERS = ("llava", "llava_onevision", "qwen2_vl", "qwen3_vl", "paligemma", "blip2_opt", "blip2_t5", "clip", "siglip")


def by_dynamo(graph, path):
    assert write_onnx(graph, path, ExportOptions(exporter="dynamo")).fallback_reason is None
    return SessionRunner({graph.name: path})


def as_program(graph, path):
    write_pt2(graph, path, aoti=False)
    ports, outputs = {graph.name: graph_ports(graph)}, {graph.name: tuple(graph.outputs)}
    return TorchRunner({graph.name: load_module("pt2", path)}, ports, outputs)


@pytest.mark.parametrize("name", FACTORIES)
def test_dynamo_and_torch_export_write_the_graphs_of_every_family(tmp_path, name):
    """ONNX of the streamed model, whose graphs are those of the one in memory (test_streamed.py), programs of that."""
    model, collator = shallow_model(name)
    save_checkpoint(tmp_path / "model", model, None, None)
    models, batch = (
        (model, stream_model(tmp_path / "model").model),
        first_batch(collator, tiny_samples(3, size_of(name))),
    )
    graphs = list(zip(*(build_graphs(one, collator.family, batch) for one in models), strict=True))
    for graph, streamed in graphs if name in DECODERS else graphs[:1]:
        feeds = {port.name: port.sample.numpy() for port in graph.inputs}
        path = tmp_path / graph.name
        runners = (by_dynamo(streamed, path.with_suffix(".onnx")), as_program(graph, path.with_suffix(".pt2")))
        for what, given in (("as traced", feeds), ("the first of the batch", first_row(graph, feeds))):
            case = Case(graph.name, what, given, torch_runner([graph]).run(graph.name, given))
            for runner in runners:
                assert measure(case, runner.run(graph.name, given)).max_relative < TORCH_LIKE


class Masks(nn.Module):
    """Every kind of mask of a decoder, of the last tokens of a text; [B, S, 1] says which are of images."""

    def forward(self, image, attention_mask, past):
        total = torch.cat([past, image], dim=1)[..., 0] * 0 + attention_mask  # as long as the cache and the new tokens
        kinds = ((EVERYTHING, True), (Reach(SLIDING, 4), True), (Reach(SLIDING, 4), False), (Reach(CHUNKED, 4), False))
        return tuple(
            causal_mask(total, image, reach, not images, image[..., 0] > 0 if images else None)
            for reach, images in kinds
        )


def test_dynamo_and_torch_export_write_masks_that_hold_at_any_length(tmp_path):
    shown = torch.randn(2, 3, 1), torch.ones(2, 7, dtype=torch.long), torch.randn(2, 4, 1)
    axes = (ROWS, {0: BATCH, 1: TOTAL}, {0: BATCH, 1: PAST})
    ports = map(Port, ("image", "attention_mask", "past"), shown, axes)
    outputs = {name: {0: BATCH, 2: SEQUENCE, 3: TOTAL} for name in ("images", "narrow", "prompt", "chunks")}
    graph = Graph("masks", Masks().eval(), tuple(ports), outputs)
    runners = (by_dynamo(graph, tmp_path / "masks.onnx"), as_program(graph, tmp_path / "masks.pt2"))
    for batch, tokens, past in ((1, 9, 0), (3, 1, 8), (2, 5, 6)):
        feeds = random_feeds(graph, batch_size=batch, sequence_length=tokens, past_sequence_length=past)
        feeds["attention_mask"][:1, : past // 4] = 0
        expected = torch_runner([graph]).run(graph.name, feeds)
        for runner in runners:
            found = runner.run(graph.name, feeds)
            assert all(np.array_equal(found[name], mask) for name, mask in expected.items())


def first_row(graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first of the batch alone; where the axis counts patches, those of one image."""
    rows = {port.name: next(iter(port.axes.items())) for port in graph.inputs}
    return {
        name: np.take(array, range(graph.unit.get(rows[name][1], 1)), axis=rows[name][0])
        for name, array in feeds.items()
    }
