"""The export of one checkpoint: graphs, files, checks, manifest, in a folder that appears when it is complete."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from slimvlm.compress.data.collate import Collator, collator_of
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import CheckFailedError, CheckpointError, OutputError, UnsuitableOptionError
from slimvlm.compress.evaluation.soundness import check_computes
from slimvlm.compress.files.folders import (
    holds_others,
    listed_files,
    refuse_inside,
    require_room,
    reserved,
    written_folder,
)
from slimvlm.compress.files.writing import reported_as_output_errors
from slimvlm.compress.models.checkpoint import build_meta, load_model, stream_model
from slimvlm.compress.models.computing import cast, free_memory, is_to_be_streamed
from slimvlm.compress.models.groups import count_parameters
from slimvlm.compress.models.streaming.weights import Holding, streamed
from slimvlm.compress.progress import Progress, silent
from slimvlm.export.checks.files import check_graphs
from slimvlm.export.checks.reference import Reference, export_samples, first_batch, image_size, make_reference
from slimvlm.export.checks.sample import write_sample
from slimvlm.export.client.bundle import is_bundle, tar_name, write_readme, write_tar
from slimvlm.export.client.client_files import external_data, write_client_files
from slimvlm.export.client.genai import genai_graphs, write_genai
from slimvlm.export.client.preprocessing import write_example
from slimvlm.export.graphs.build import build_graphs, check_exportable
from slimvlm.export.graphs.graph import Graph, Model
from slimvlm.export.options import STREAMED_BYTES, TORCHSCRIPT, ExportOptions
from slimvlm.export.packages import require_packages
from slimvlm.export.running.manifest import Document, Manifest
from slimvlm.export.variants import QUANTIZED, VARIANTS, Variant
from slimvlm.export.writers.formats import write_graphs


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The folder, its manifest, and seconds it took."""

    out: Path
    manifest: Manifest
    seconds: float


def export_checkpoint(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], options: ExportOptions, progress: Progress = silent
) -> ExportResult:
    """Exports a checkpoint (dense, per-layer or stock layout, or a hub name) into the folder `out`.

    Raises:
        SlimvlmError: refused: unsupported model, option, missing package, an occupied or full `out`.
        CheckFailedError: a graph differs from torch; the files are kept and marked, the result is in the error.
    """
    require_packages(options)
    checkpoint, out, options = os.fspath(folder), Path(out), options.checked()
    refuse_inside(out, {"model": checkpoint, "data": options.data})
    refuse_occupied(out, options.overwrite)
    if options.bundle:
        refuse_occupied(tar_name(out), options.overwrite)
    meta, family = build_meta(checkpoint, options.trust_remote_code)
    check_exportable(meta.config, family)
    require_room(out, _bytes_written(options, meta))
    streams = _streams(options, meta)
    if streams:
        options = replace(options, external_bytes=min(options.external_bytes, STREAMED_BYTES))
    load = partial(stream_model, holding=Holding(free_memory(), tables=False)) if streams else load_model
    with reserved(out):
        loaded = load(checkpoint, dtype=torch.float32, trust_remote_code=options.trust_remote_code)
        collator = collator_of(loaded)
        origin = {"source": _public(checkpoint), "digest": loaded.digest, "family": loaded.family.name}
        return export_model(loaded.model, collator, out, options, progress, origin)


def export_model(
    model: Model,
    collator: Collator,
    out: Path,
    options: ExportOptions,
    progress: Progress,
    origin: Document,
) -> ExportResult:
    """As `export_checkpoint`, of a model in memory (fp32, in eval mode; fp16 variants cast its weights)."""
    started = time.perf_counter()
    samples = export_samples(collator, model, options)
    check = partial(check_computes, model, collator, samples[0], origin.get("source", "the model"))
    reads_blocks = streamed(model) is not None  # it is asked with all else
    if not reads_blocks:
        check()
    graphs = _graphs(model, collator, samples)
    progress("reference", 0, 1)
    before = [check] if reads_blocks else []
    reference = make_reference(model, collator, graphs, samples, options.max_new_tokens, before)
    progress("reference", 1, 1)
    manifest = Manifest(model={**origin, "type": model.config.model_type}, options=_stated(options))
    with written_folder(out, earlier_export(out)) as unfinished:
        for dtype, variants in _by_dtype(options.written).items():
            if (kind := getattr(torch, dtype)) != model.dtype:
                graphs = _graphs(cast(model, kind), collator, samples)
            artifacts = write_graphs(unfinished, graphs, variants, options, progress)
            manifest.artifacts += artifacts
            check_graphs(unfinished, artifacts, graphs, reference, manifest, progress)
        _write_client(unfinished, model, reference, options, manifest)
        write_readme(unfinished, model, collator.family, manifest)
        manifest.write(unfinished)
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


def _streams(options: ExportOptions, meta: Model) -> bool:
    """Whether the model is streamed; by `auto` where it and a session of its graphs do not fit in fp32.

    Raises:
        UnsuitableOptionError: it is asked for what holds all weights in memory.
    """
    if options.formats == ("onnx",) and options.exporter != TORCHSCRIPT and options.fuse is None:
        return is_to_be_streamed(options.stream, 2 * 4 * count_parameters(meta))
    if options.stream == "on":
        raise UnsuitableOptionError(
            "--stream on writes ONNX graphs by the dynamo exporter; what TorchScript, torch.export and --fuse write is "
            "made of all weights in memory: leave --stream out"
        )
    return False


def _bytes_written(options: ExportOptions, meta: Model) -> int:
    """About what the weights of all graphs take."""
    traced, rounded = set(options.written) - set(QUANTIZED), set(options.written) & set(QUANTIZED)
    written = [name for form in options.formats for name in (traced | rounded if form == "onnx" else traced)]
    return round(count_parameters(meta) * sum(VARIANTS[name].weight_bytes for name in written))


def _graphs(model: Model, collator: Collator, samples: Sequence[Sample]) -> tuple[Graph, ...]:
    batch = first_batch(collator, samples)
    return build_graphs(model, collator.family, batch) + genai_graphs(model, collator.family)


def _by_dtype(names: Sequence[str]) -> dict[str, list[Variant]]:
    """Variants that are written from the same traced graphs, fp32 first."""
    found: dict[str, list[Variant]] = {}
    for variant in sorted((VARIANTS[name] for name in names), key=lambda row: row.value_bytes, reverse=True):
        found.setdefault(variant.dtype, []).append(variant)
    return found


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


def _public(name: str | os.PathLike[str]) -> str:
    """A name on the hub, or of what lies here without the folders it lies in: a manifest is given away."""
    return Path(name).absolute().name if Path(name).exists() else os.fspath(name)


def _stated(options: ExportOptions) -> Document:
    stated = {**asdict(options), "data": None if options.data is None else _public(options.data)}
    return {name: value for name, value in stated.items() if name not in ("overwrite", "trust_remote_code", "stream")}


def _write_client(folder: Path, model: Model, reference: Reference, options: ExportOptions, manifest: Manifest) -> None:
    """What clients find beside the graphs: configs, a sample, and where they can run it, `run_onnx.py`."""
    collator, prompting = reference.collator, reference.prompting
    external = external_data(folder, manifest)
    write_client_files(folder, model, collator, prompting, external)
    write_sample(folder, reference.first, reference.expected)
    if external:
        manifest.run["external_data"] = external
    if (size := image_size(collator, model.config, options)) is not None:
        manifest.run["image_size"] = list(size)
    if prompting is None or "onnx" not in options.formats:
        return
    manifest.run |= write_example(folder, collator, list(reference.samples), size)
    if collator.family.export.genai is not None:
        onnx = [artifact for artifact in manifest.artifacts if artifact.format == "onnx"]
        files = {artifact.graph: artifact.file for artifact in onnx if artifact.variant == onnx[0].variant}
        write_genai(folder, model, collator, prompting, files)
