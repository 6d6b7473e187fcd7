"""The export stage of a run: `export/`, its graphs checked against the slim model."""

from __future__ import annotations

from pathlib import Path

from slimvlm.compress.errors import CheckFailedError, SlimvlmError
from slimvlm.compress.options import DeliverOptions
from slimvlm.compress.progress import Progress
from slimvlm.compress.runs import EXPORT, MODEL, RunFolder
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.options import DTYPES
from slimvlm.export.packages import installed_formats
from slimvlm.export.running.manifest import Document
from slimvlm.export.variants import FULL


def export_stage(run: RunFolder, options: DeliverOptions, data: Path, progress: Progress) -> Document:
    """Write `export/`, checked on the samples of `data`; what was recorded.

    A check that fails is recorded, and fails the run at its end; so is a model that cannot be exported, unless formats
    were asked for: then it is refused.
    """
    formats = installed_formats() if options.export is None else options.export
    asked = {"formats": list(formats), "variants": list(options.variants)}
    if run.finished("export") and asked.items() <= {"variants": [], **run.facts("export")}.items():
        return run.facts("export")
    run.forget("profile")
    run.remove(EXPORT)
    with run.stage("export", **asked) as facts:
        if formats:
            facts.update(_export(run, options, formats, data, progress))
    return run.facts("export")


def exported_formats(recorded: Document) -> tuple[str, ...]:
    """The formats of an export stage whose graphs can be run."""
    return () if "failed" in recorded or "refused" in recorded else tuple(recorded["formats"])


def _export(
    run: RunFolder, options: DeliverOptions, formats: tuple[str, ...], data: Path, progress: Progress
) -> Document:
    code = options.trust_remote_code
    variants = options.variants
    if variants and formats != ("onnx",) and not set(variants) & set(DTYPES):
        variants = (FULL, *variants)  # which graphs of torch are
    chosen = ExportOptions(formats=formats, variants=variants, data=data, seed=options.seed, trust_remote_code=code)
    try:
        exported = export_checkpoint(run.path / MODEL, run.path / EXPORT, chosen, progress)
    except CheckFailedError as failed:
        return {"failed": str(failed)}
    except SlimvlmError as refused:
        if options.export is not None:
            raise
        return {"refused": str(refused)}
    return {"checks": exported.manifest.checks}
