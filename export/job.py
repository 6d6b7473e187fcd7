"""The export of one checkpoint: graphs, files, checks, manifest, in a folder that appears when it is complete."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slimvlm.compress.data.collate import Collator, collator_of
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import CheckFailedError, CheckpointError, OutputError
from slimvlm.compress.evaluation.soundness import check_computes
from slimvlm.compress.files.folders import holds_others, listed_files, refuse_inside, reserved, written_folder
from slimvlm.compress.files.writing import reported_as_output_errors
from slimvlm.compress.models.checkpoint import build_meta, load_model
from slimvlm.compress.progress import Progress, silent
from slimvlm.export.checks.files import check_graphs
from slimvlm.export.checks.reference import (
    Reference,
    export_samples,
    first_batch,
    graph_ports,
    image_size,
    make_reference,
)
from slimvlm.export.checks.sample import write_sample
from slimvlm.export.client.bundle import is_bundle, tar_name, write_readme, write_tar
from slimvlm.export.client.client_files import name_external_data, write_client_files
from slimvlm.export.client.genai import genai_graphs, write_genai
from slimvlm.export.client.preprocessing import NoRecipeError, check_recipe, make_recipe, one_tile, single_batches
from slimvlm.export.graphs.build import build_graphs
from slimvlm.export.graphs.decoder import EMBEDDING
from slimvlm.export.graphs.graph import Graph
from slimvlm.export.graphs.windows import refuse_windows
from slimvlm.export.options import ExportOptions
from slimvlm.export.running.manifest import Artifact, Manifest
from slimvlm.export.writers.torch_writer import compiled_name, write_pt2, write_torchscript

EXAMPLE = "run_onnx.py"
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}  # of file names, as transformers.js asks for them
EXTENSIONS = {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2", "aoti": ".aoti.pt2"}


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The folder, its manifest, and seconds it took."""

    out: Path
    manifest: Manifest
    seconds: float


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported; `graphs` change with the precision of `model`."""

    model: Any
    collator: Collator
    graphs: tuple[Graph, ...]
    reference: Reference


def run_export(checkpoint: str, out: Path, options: ExportOptions, progress: Progress = silent) -> ExportResult:
    """See `slimvlm.export.export_checkpoint`."""
    options = options.checked()
    refuse_inside(out, {"model": checkpoint, "data": options.data})
    refuse_occupied(out, options.overwrite)
    if options.bundle:
        refuse_occupied(tar_name(out), options.overwrite)
    refuse_windows(build_meta(checkpoint, options.trust_remote_code)[0].config)
    with reserved(out):
        loaded = load_model(
            checkpoint, trust_remote_code=options.trust_remote_code, dtype=torch.float32, attention="sdpa"
        )
        collator = collator_of(loaded)
        origin = {"source": str(checkpoint), "digest": loaded.digest, "family": loaded.family.name}
        return export_model(loaded.model, collator, out, options, progress, origin)


def export_model(
    model: Any,
    collator: Collator,
    out: Path,
    options: ExportOptions,
    progress: Progress,
    origin: dict[str, Any],
) -> ExportResult:
    """As `run_export`, of a model in memory (fp32, in eval mode; `options.dtype` fp16 casts its weights)."""
    started = time.perf_counter()
    samples = export_samples(collator, model, options)
    check_computes(model, collator, samples[0], origin.get("source", "the model"))
    graphs = _graphs(model, collator, samples)
    progress("reference", 0, 1)
    reference = make_reference(model, collator, graphs, samples, options.max_new_tokens)
    progress("reference", 1, 1)
    if options.dtype == "fp16":
        graphs = _graphs(_to_fp16(model), collator, samples)
    source = _Source(model, collator, graphs, reference)
    manifest = Manifest(model={**origin, "type": model.config.model_type}, options=_stated(options))
    with written_folder(out, earlier_export(out)) as partial:
        _write_graphs(partial, source, options, manifest, progress)
        check_graphs(partial, source.graphs, source.reference, manifest, progress)
        _write_beside(partial, source, options, manifest)
        if options.bundle:
            write_readme(partial, manifest)
        manifest.write(partial)
    if options.bundle:
        write_tar(out, manifest)
    result = ExportResult(out, manifest, time.perf_counter() - started)
    if manifest.failures:
        raise CheckFailedError(
            f"{out}: {len(manifest.failures)} checks failed, first: {manifest.failures[0]}; the files are kept and "
            "marked in manifest.json",
            result,
        )
    return result


def _graphs(model: Any, collator: Collator, samples: Sequence[Sample]) -> tuple[Graph, ...]:
    batch = first_batch(collator, samples)
    return build_graphs(model, collator.family, batch) + genai_graphs(model, collator.family)


def _to_fp16(model: torch.nn.Module) -> torch.nn.Module:
    """Casts the weights in place; buffers stay (rotary frequencies are computed in fp32)."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    return model


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raises OutputError unless `out` is absent, an empty folder, or an export or bundle that may be replaced."""
    with reported_as_output_errors(out):
        if out.is_dir():
            if holds_others(out) and not (overwrite and earlier_export(out)):
                raise OutputError(f"{out} is not empty; choose another name, or --overwrite an earlier export")
        elif os.path.lexists(out) and not (overwrite and is_bundle(out)):
            raise OutputError(f"{out} is there already; choose another name, or --overwrite an earlier bundle")


def earlier_export(folder: Path) -> tuple[str, ...]:
    """The files of the export in `folder`, by its manifest; none where there is no export."""
    try:
        Manifest.read(folder)
    except CheckpointError:  # a checkpoint has a manifest too, but of another kind
        return ()
    return listed_files(folder)


def _stated(options: ExportOptions) -> dict[str, Any]:
    stated = {**asdict(options), "data": None if options.data is None else str(options.data)}
    return {name: value for name, value in stated.items() if name not in ("overwrite", "trust_remote_code")}


# ------------------------------------------------------------------ graphs


def _write_graphs(
    folder: Path, source: _Source, options: ExportOptions, manifest: Manifest, progress: Progress
) -> None:
    """Every graph in every format and variant."""
    todo = [(form, graph) for form in options.formats for graph in source.graphs]
    for done, (form, graph) in enumerate(todo):
        progress("export", done, len(todo))
        (folder / form).mkdir(exist_ok=True)
        for artifact in WRITERS[form](folder, graph, options):
            artifact.inputs = [asdict(port) for port in graph_ports(graph)]
            manifest.artifacts.append(artifact)
    progress("export", len(todo), len(todo))
    if "onnx" in options.formats:
        _share_embeddings(folder, options, manifest)
    external = {
        artifact.file.removeprefix("onnx/"): 1
        for artifact in manifest.artifacts
        if artifact.format == "onnx" and (folder / f"{artifact.file}_data").exists()
    }
    if external:
        manifest.run["external_data"] = external


def _share_embeddings(folder: Path, options: ExportOptions, manifest: Manifest) -> None:
    """Int8 has no part in it: table and head are quantized along other axes."""
    from slimvlm.export.writers.sharing import share_table

    files = {
        artifact.graph: folder / artifact.file
        for artifact in manifest.artifacts
        if artifact.format == "onnx" and artifact.variant == options.dtype
    }
    if (owner := files.pop(EMBEDDING, None)) is not None:
        share_table(owner, list(files.values()), options.external_bytes)


def _onnx(folder: Path, graph: Graph, options: ExportOptions) -> list[Artifact]:
    from slimvlm.export.writers.onnx_rewriting import fuse, quantize_int8
    from slimvlm.export.writers.onnx_writer import write_onnx

    started = time.perf_counter()
    path = folder / _file("onnx", graph.name, options.dtype)
    written = write_onnx(graph, path, options.onnx)
    if options.fuse is not None:
        fuse(path, options.fuse, options.external_bytes)
    artifact = Artifact(
        graph=graph.name,
        format="onnx",
        variant=options.dtype,
        file=_file("onnx", graph.name, options.dtype),
        exporter=written.exporter,
        seconds=time.perf_counter() - started,
        opset=written.opset,
        fallback_reason=written.fallback_reason,
        fused_for=options.fuse,
    )
    if options.quantize is None:
        return [artifact]
    started = time.perf_counter()
    file = _file("onnx", graph.name, options.quantize)
    quantize_int8(path, folder / file, options.external_bytes)
    seconds = time.perf_counter() - started
    return [artifact, replace(artifact, variant=options.quantize, file=file, seconds=seconds, parity=[])]


def _torchscript(folder: Path, graph: Graph, options: ExportOptions) -> list[Artifact]:
    return [_torch_artifact("torchscript", folder, graph, options, lambda path: write_torchscript(graph, path))]


def _pt2(folder: Path, graph: Graph, options: ExportOptions) -> list[Artifact]:
    artifact = _torch_artifact("pt2", folder, graph, options, lambda path: write_pt2(graph, path, options.aoti))
    if not options.aoti:
        return [artifact]
    compiled = compiled_name(Path(artifact.file)).as_posix()
    return [artifact, replace(artifact, format="aoti", file=compiled, exporter="torch._inductor", parity=[])]


def _torch_artifact(
    form: str, folder: Path, graph: Graph, options: ExportOptions, write: Callable[[Path], None]
) -> Artifact:
    started = time.perf_counter()
    file = _file(form, graph.name, options.dtype)
    write(folder / file)
    exporter = {"torchscript": "torch.jit.trace", "pt2": "torch.export"}[form]
    return Artifact(graph.name, form, options.dtype, file, exporter, time.perf_counter() - started)


WRITERS: dict[str, Callable[[Path, Graph, ExportOptions], list[Artifact]]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "pt2": _pt2,
}


def _file(form: str, graph: str, variant: str) -> str:
    return f"{form}/{graph}{SUFFIXES[variant]}{EXTENSIONS[form]}"


def _write_beside(folder: Path, source: _Source, options: ExportOptions, manifest: Manifest) -> None:
    processor, name = source.collator.processor, source.model.config.name_or_path
    flat = source.collator.family.export.flat_config
    write_client_files(folder, source.model, processor, source.reference.prompting, Path(name or "."), flat)
    name_external_data(folder, manifest.run.get("external_data", {}))
    write_sample(folder, source.reference.first, source.reference.expected)
    if (size := image_size(source.collator, source.model.config, options)) is not None:
        manifest.run["image_size"] = list(size)
    prompting = source.reference.prompting
    if prompting is None or "onnx" not in options.formats:
        return
    _write_example(folder, source, options, manifest)
    if (known_as := source.collator.family.export.genai) is not None:
        write_genai(folder, known_as, source.model, processor, prompting)


def _write_example(folder: Path, source: _Source, options: ExportOptions, manifest: Manifest) -> None:
    """`run_onnx.py`, if its recipe gives what the processor gives."""
    collator, samples = source.collator, list(source.reference.samples)
    size = image_size(collator, source.model.config, options)
    try:
        with one_tile(collator) as plain:
            alone = single_batches(plain, samples)
            recipe = make_recipe(plain, samples[0], alone[0], size)
            check_recipe(plain, recipe, samples[: len(alone)], alone)
    except NoRecipeError as error:
        manifest.run["why_not"] = str(error)
        return
    manifest.run |= recipe
    if plain is not collator:
        manifest.run["note"] = f"{EXAMPLE} gives the model the whole image only; its processor also cuts it into tiles"
    shutil.copyfile(Path(__file__).with_name("client") / EXAMPLE, folder / EXAMPLE)
