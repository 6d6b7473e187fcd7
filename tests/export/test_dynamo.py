"""The dynamo exporter writes the graphs of every family, and they are the model."""

import numpy as np
import pytest
from exports import SIZES, shallow_model, tiny_samples
from tiny_models import FACTORIES

from slimvlm.export.checks.parity import Case, measure
from slimvlm.export.checks.reference import first_batch, torch_runner
from slimvlm.export.graphs.build import build_graphs
from slimvlm.export.options import ExportOptions
from slimvlm.export.running.runners import SessionRunner
from slimvlm.export.writers.onnx_writer import write_onnx

TORCH_LIKE = 1e-5  # relative error of what is only written differently
# One family of every kind of language model: the other decoders are the same modules.
DECODERS = ("llava", "llava_onevision", "qwen2_vl", "qwen3_vl", "paligemma", "blip2_opt", "blip2_t5", "clip", "siglip")


@pytest.mark.parametrize("name", FACTORIES)
def test_the_dynamo_exporter_writes_the_graphs_of_every_family(tmp_path, name):
    model, collator = shallow_model(name)
    samples = tiny_samples(3, SIZES.get(collator.family.export.vision, (16, 16)))
    graphs = build_graphs(model, collator.family, first_batch(collator, samples))
    for graph in graphs if name in DECODERS else graphs[:1]:
        path = tmp_path / f"{graph.name}.onnx"
        assert write_onnx(graph, path, ExportOptions(exporter="dynamo")).fallback_reason is None
        feeds = {port.name: port.sample.numpy() for port in graph.inputs}
        for what, given in (("as traced", feeds), ("the first of the batch", first_row(graph, feeds))):
            case = Case(graph.name, what, given, torch_runner([graph]).run(graph.name, given))
            assert measure(case, SessionRunner({graph.name: path}).run(graph.name, given)).max_relative < TORCH_LIKE


def first_row(graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first of the batch alone; where the axis counts patches, those of one image."""
    rows = {port.name: next(iter(port.axes.items())) for port in graph.inputs}
    return {
        name: np.take(array, range(graph.unit.get(rows[name][1], 1)), axis=rows[name][0])
        for name, array in feeds.items()
    }
