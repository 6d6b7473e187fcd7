"""Cut tiny models of every family as exports, with their real processors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from plans import keep_blocks, random_plan
from tiny_models import tiny_model
from tiny_processors import tiny_image, tiny_processor

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import MissingDependencyError
from slimvlm.compress.evaluation.quality import Quality
from slimvlm.compress.models.families import find_family
from slimvlm.compress.options import EvaluateOptions
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.export.checks.reference import graph_ports
from slimvlm.export.checks.sample import read_sample
from slimvlm.export.graphs.graph import Graph
from slimvlm.export.job import ExportResult, export_model
from slimvlm.export.options import ExportOptions
from slimvlm.export.running.evaluation import evaluate_export
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.generation import Arrays, until_end

SIZES = {
    "tiles": (16, 16),
    "patches": (32, 32),
    "single": (16, 16),
}  # of images where the graph has one grid; patches: two windows each way


def cut_model(name, seed=1):
    """A tiny model in which every layer lost another number of heads and channels, and its collator."""
    model = tiny_model(name, "sdpa").model
    apply_plan(model, random_plan(model, seed))
    family = find_family(model.config)
    return model, Collator(tiny_processor(name), family, model.config)


def shallow_model(name):
    """As `cut_model`, with the first block of every tower only: for exporters that take seconds."""
    model, collator = cut_model(name)
    apply_plan(model, keep_blocks(model, lambda group: range(1, group.size)))
    return model, collator


def tiny_samples(count, size=(16, 16)) -> list[Sample]:
    """Questions of different lengths about images of noise."""
    samples = []
    for index in range(count):
        buffer = io.BytesIO()
        tiny_image(*size, seed=index).save(buffer, "PNG")
        turn = Turn("what is it" + " red" * (index % 3), ("cat",))
        samples.append(Sample(Path(f"{index}.png"), (turn,), f"sample {index}", content=buffer.getvalue()))
    return samples


def quality_of(export: Path, name: str, backend: str | None, samples: list[Sample]) -> Quality:
    """By `evaluate_export`; some families' processors cannot be read from a folder without torchvision."""
    read, asked = Exported.collator, EvaluateOptions(model="", data=Path())
    try:
        return evaluate_export(export, backend, samples, asked)
    except MissingDependencyError:
        Exported.collator = lambda self: cut_model(name)[1]
        return evaluate_export(export, backend, samples, asked)
    finally:
        Exported.collator = read


def size_of(name: str) -> tuple[int, int]:
    """Of images that an export of the family takes as they are."""
    return SIZES.get(find_family(tiny_model(name, "sdpa").model.config).export.vision, (16, 16))


def export_tiny(name: str, out: Path, make=cut_model, **options) -> ExportResult:
    """A cut tiny model, exported with the fast exporter and a few samples unless `options` say otherwise."""
    model, collator = make(name)
    size = SIZES.get(collator.family.export.vision)
    chosen = {"exporter": "torchscript", "samples": 5, "max_new_tokens": 6, "image_size": size, **options}
    return export_model(model, collator, out, ExportOptions(**chosen).checked(), lambda *_: None, {"family": name})


def answer_of(result: ExportResult, name: str) -> str:
    """What torch answers to the stored sample, the last of them."""
    tokens = read_sample(result.out)[1]["tokens"][0].tolist()
    kept = until_end(tokens, result.manifest.generation.end)
    return tiny_processor(name).tokenizer.decode(kept, skip_special_tokens=True).strip()


def random_feeds(graph: Graph, **sizes: int) -> Arrays:
    """Arrays for a decoder graph at other sizes of its axes; `total_sequence_length` follows from the others."""
    sizes["total_sequence_length"] = sizes["past_sequence_length"] + sizes["sequence_length"]
    random, feeds = np.random.default_rng(0), {}
    for port in graph_ports(graph):
        shape = [sizes[size] if isinstance(size, str) else size for size in port.shape]
        if port.dtype == "int64":
            first = 0 if port.name == "attention_mask" else sizes["past_sequence_length"]
            count = np.ones(shape, np.int64) if port.name == "attention_mask" else np.arange(shape[-1])
            feeds[port.name] = np.broadcast_to(first + count, shape).copy()
        else:
            feeds[port.name] = random.standard_normal(shape).astype(port.dtype)
    return feeds
