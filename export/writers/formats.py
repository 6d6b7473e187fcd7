"""All graphs of an export as files, one function per format: each variant of a graph is an artifact."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from slimvlm.compress.progress import Progress
from slimvlm.export.graphs.graph import Graph
from slimvlm.export.options import ExportOptions
from slimvlm.export.running.manifest import Artifact
from slimvlm.export.running.names import EMBED
from slimvlm.export.variants import Variant
from slimvlm.export.writers.torch_writer import compiled_name, write_pt2, write_torchscript


def write_graphs(
    folder: Path, graphs: Sequence[Graph], variants: Sequence[Variant], options: ExportOptions, progress: Progress
) -> list[Artifact]:
    """Every graph in every format, in those of the variants that the format has; all are of the dtype of the graphs.

    Raises:
        UnsupportedModelError: no exporter can write one of them.
    """
    todo = [(form, graph) for form in options.formats for graph in graphs]
    artifacts: list[Artifact] = []
    for done, (form, graph) in enumerate(todo):
        progress("export", done, len(todo))
        (folder / form).mkdir(exist_ok=True)
        artifacts += FORMATS[form](folder, graph, variants, options)
    progress("export", len(todo), len(todo))
    _share_embeddings(folder, artifacts, options)
    return artifacts


def _onnx(folder: Path, graph: Graph, variants: Sequence[Variant], options: ExportOptions) -> Iterator[Artifact]:
    """The graph is traced once; every variant is a rewriting of it, and reads the weights anew."""
    from slimvlm.export.writers.onnx_rewriting import fuse
    from slimvlm.export.writers.onnx_writer import trace_onnx, write_variant
    from slimvlm.export.writers.rounding import largest_shift

    started = time.perf_counter()
    traced = trace_onnx(graph, options)
    if options.fuse is not None:
        fuse(traced.model, options.fuse)
    for variant in variants:
        file = _file("onnx", graph, variant, ".onnx")
        write_variant(traced.model, folder / file, variant, options.external_bytes)
        yield Artifact(
            graph=graph.name,
            format="onnx",
            variant=variant.name,
            file=file,
            exporter=traced.exporter,
            seconds=time.perf_counter() - started,
            opset=traced.opset,
            fallback_reason=traced.fallback_reason,
            fused_for=options.fuse,
            steps=largest_shift(traced.model, folder / file, variant) if variant.is_rounded else None,
        )
        started = time.perf_counter()


def _torchscript(folder: Path, graph: Graph, variants: Sequence[Variant], _: ExportOptions) -> Iterator[Artifact]:
    for variant in (row for row in variants if row.writer is None):
        started, file = time.perf_counter(), _file("torchscript", graph, variant, ".pt")
        write_torchscript(graph, folder / file)
        seconds = time.perf_counter() - started
        yield Artifact(graph.name, "torchscript", variant.name, file, "torch.jit.trace", seconds)


def _pt2(folder: Path, graph: Graph, variants: Sequence[Variant], options: ExportOptions) -> Iterator[Artifact]:
    for variant in (row for row in variants if row.writer is None):
        started, file = time.perf_counter(), _file("pt2", graph, variant, ".pt2")
        write_pt2(graph, folder / file, options.aoti)
        seconds = time.perf_counter() - started
        program = Artifact(graph.name, "pt2", variant.name, file, "torch.export", seconds)
        yield program
        if options.aoti:
            compiled = compiled_name(Path(file)).as_posix()
            yield replace(program, format="aoti", file=compiled, exporter="torch._inductor", parity=[])


FORMATS = {"onnx": _onnx, "torchscript": _torchscript, "pt2": _pt2}


def _file(form: str, graph: Graph, variant: Variant, extension: str) -> str:
    return f"{form}/{graph.name}{variant.suffix}{extension}"


def _share_embeddings(folder: Path, artifacts: Sequence[Artifact], options: ExportOptions) -> None:
    """Of every variant; int8 has nothing to share: ONNX Runtime quantizes table and head along other axes."""
    from slimvlm.export.writers.sharing import share_table

    onnx = [artifact for artifact in artifacts if artifact.format == "onnx"]
    for table in (artifact for artifact in onnx if artifact.graph == EMBED):
        readers = [folder / other.file for other in onnx if other.variant == table.variant and other is not table]
        share_table(folder / table.file, readers, options.external_bytes)
