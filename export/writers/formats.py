"""All graphs of an export as files, one function per format: each variant of a graph is an artifact."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

from slimvlm.compress.progress import Progress
from slimvlm.export.graphs.decoder import EMBEDDING
from slimvlm.export.graphs.graph import Graph
from slimvlm.export.options import ExportOptions
from slimvlm.export.running.manifest import Artifact
from slimvlm.export.variants import VARIANTS
from slimvlm.export.writers.torch_writer import compiled_name, write_pt2, write_torchscript


def write_graphs(folder: Path, graphs: Sequence[Graph], options: ExportOptions, progress: Progress) -> list[Artifact]:
    """Every graph in every format and variant.

    Raises:
        UnsupportedModelError: no exporter can write one of them.
    """
    todo = [(form, graph) for form in options.formats for graph in graphs]
    artifacts: list[Artifact] = []
    for done, (form, graph) in enumerate(todo):
        progress("export", done, len(todo))
        (folder / form).mkdir(exist_ok=True)
        artifacts += FORMATS[form](folder, graph, options)
    progress("export", len(todo), len(todo))
    if "onnx" in options.formats:
        _share_embeddings(folder, artifacts, options)
    return artifacts


def _onnx(folder: Path, graph: Graph, options: ExportOptions) -> Iterator[Artifact]:
    from slimvlm.export.writers.onnx_rewriting import fuse
    from slimvlm.export.writers.onnx_writer import write_onnx

    started, file = time.perf_counter(), _file("onnx", graph, options.dtype, ".onnx")
    written = write_onnx(graph, folder / file, options)
    if options.fuse is not None:
        fuse(folder / file, options.fuse, options.external_bytes)
    traced = Artifact(
        graph=graph.name,
        format="onnx",
        variant=options.dtype,
        file=file,
        exporter=written.exporter,
        seconds=time.perf_counter() - started,
        opset=written.opset,
        fallback_reason=written.fallback_reason,
        fused_for=options.fuse,
    )
    yield traced
    if options.quantize is not None:
        started, target = time.perf_counter(), _file("onnx", graph, options.quantize, ".onnx")
        quantize = resolve_name(str(VARIANTS[options.quantize].writer))
        quantize(folder / file, folder / target, options.external_bytes)
        seconds = time.perf_counter() - started
        yield replace(traced, variant=options.quantize, file=target, seconds=seconds, parity=[])


def _torchscript(folder: Path, graph: Graph, options: ExportOptions) -> Iterator[Artifact]:
    started, file = time.perf_counter(), _file("torchscript", graph, options.dtype, ".pt")
    write_torchscript(graph, folder / file)
    seconds = time.perf_counter() - started
    yield Artifact(graph.name, "torchscript", options.dtype, file, "torch.jit.trace", seconds)


def _pt2(folder: Path, graph: Graph, options: ExportOptions) -> Iterator[Artifact]:
    started, file = time.perf_counter(), _file("pt2", graph, options.dtype, ".pt2")
    write_pt2(graph, folder / file, options.aoti)
    seconds = time.perf_counter() - started
    program = Artifact(graph.name, "pt2", options.dtype, file, "torch.export", seconds)
    yield program
    if options.aoti:
        compiled = compiled_name(Path(file)).as_posix()
        yield replace(program, format="aoti", file=compiled, exporter="torch._inductor", parity=[])


FORMATS = {"onnx": _onnx, "torchscript": _torchscript, "pt2": _pt2}


def _file(form: str, graph: Graph, variant: str, extension: str) -> str:
    return f"{form}/{graph.name}{VARIANTS[variant].suffix}{extension}"


def _share_embeddings(folder: Path, artifacts: Sequence[Artifact], options: ExportOptions) -> None:
    """Quantized graphs have no part in it: table and head are quantized along other axes."""
    from slimvlm.export.writers.sharing import share_table

    files = {
        artifact.graph: folder / artifact.file
        for artifact in artifacts
        if artifact.format == "onnx" and artifact.variant == options.dtype
    }
    if (owner := files.pop(EMBEDDING, None)) is not None:
        share_table(owner, list(files.values()), options.external_bytes)
