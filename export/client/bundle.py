"""The model card of an export, and the one tar for a device: all its files, with the manifest."""

from __future__ import annotations

import tarfile
from pathlib import Path

from slimvlm.compress.card import write_export_card
from slimvlm.compress.evaluation.quality import FORCED
from slimvlm.compress.files.decoding import LARGEST_FILE, decode, parse
from slimvlm.compress.files.folders import MANIFEST
from slimvlm.compress.files.writing import written_file
from slimvlm.compress.models.families import Family
from slimvlm.export.graphs.graph import Model
from slimvlm.export.running.manifest import Document, Manifest
from slimvlm.export.variants import QUANTIZED


def write_readme(folder: Path, model: Model, family: Family, manifest: Manifest) -> None:
    """Writes the card: how to run, check and read the folder, and what its model is."""
    source = Path(model.config.name_or_path).expanduser() if model.config.name_or_path else None
    formats = dict.fromkeys(artifact.format for artifact in manifest.artifacts)
    rounded = any(artifact.variant in QUANTIZED for artifact in manifest.artifacts)
    tags = (*formats, *(("quantization",) if rounded else ()))
    write_export_card(folder, source, "\n".join(_lines(manifest)), contrastive=family.contrastive, tags=tags)


def write_tar(folder: Path, manifest: Manifest) -> Path:
    """`<folder>.tar` with the files of the export, the same bytes for the same files.

    Raises:
        OutputError: it cannot be written.
    """
    target = tar_name(folder)
    with written_file(target) as partial, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in (*manifest.files, MANIFEST):
            archive.add(folder / name, f"{folder.name}/{name}", filter=_anonymous)
    return target


def is_bundle(path: Path) -> bool:
    """Whether a file is what `write_tar` writes: a tar whose one folder has the manifest of an export."""
    try:
        with tarfile.open(path, "r:") as archive:
            member = archive.extractfile(f"{path.stem}/{MANIFEST}")
            return member is not None and bool(decode(parse(member.read(LARGEST_FILE)), Manifest))
    except (OSError, KeyError, ValueError, tarfile.TarError):
        return False


def tar_name(folder: Path) -> Path:
    """Where the bundle of an export stands."""
    return folder.with_name(folder.name + ".tar")


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry


def _lines(manifest: Manifest) -> list[str]:
    runs = manifest.run
    lines = [
        "## Graphs",
        "",
        "| graph | format | variant | file | largest relative error |",
        "|---|---|---|---|---|",
    ]
    for artifact in manifest.artifacts:
        error = max((difference["max_relative"] for difference in artifact.parity), default=float("nan"))
        lines.append(f"| {artifact.graph} | {artifact.format} | {artifact.variant} | {artifact.file} | {error:.1e} |")
    lines += ["", "Against torch, on the samples the export was checked with:", ""]
    lines += [f"- {_check(check)}" for check in manifest.checks] or ["- every graph (see `parity` in manifest.json)"]
    lines += [f"- **failed**: {failure}" for failure in manifest.failures]
    if "prompt" in runs:
        lines += [
            "",
            "## Run",
            "",
            "```",
            "pip install numpy pillow onnxruntime tokenizers",
            'python run_onnx.py IMAGE "QUESTION"',
            "```",
        ]
        lines += ["", runs["note"] + "."] if "note" in runs else []
    elif "why_not" in runs:
        lines += ["", f"`run_onnx.py` is not here: {runs['why_not']}."]
    lines += [
        "",
        "## Check",
        "",
        "`slimvlm export --verify .` compares all files with manifest.json and runs its sample.",
        "",
    ]
    return lines


def _check(check: Document) -> str:
    right = (
        "" if check["accuracy"] is None else f", right answers {check['accuracy']:.1%} ({check['torch_accuracy']:.1%})"
    )
    forced = f"; {FORCED}" if check["forced"] else ""
    return (
        f"{check['format']} {check['variant']}: {check['equal']} of {check['samples']} answers equal, "
        f"{check['token_share']:.1%} of the tokens{right}{forced}"
    )
