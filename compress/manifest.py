"""`manifest.json` of an export: every file with size and sha256, every graph with its ports, exporter and parity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.files import file_digest, installed_versions, write_text

NAME = "manifest.json"
SAMPLE = "sample.safetensors"
SCHEMA = 1
VERSIONED = ("slimvlm", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(slots=True)
class Artifact:
    """One graph in one format and variant.

    Attributes:
        file: relative to the folder, with `/`.
        variant: `fp32`, `fp16` or `int8`.
        inputs, outputs: name, dtype and shape; axes that vary by name.
        parity: differences against torch, one per case.
    """

    graph: str
    format: str
    variant: str
    file: str
    exporter: str
    seconds: float
    opset: int | None = None
    fallback_reason: str | None = None
    fused_for: str | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    ok: bool = True


@dataclass(slots=True)
class Manifest:
    """What an export holds; `checks` are of whole generations, `failures` say what is wrong, `run` is for clients."""

    model: dict[str, Any]
    options: dict[str, Any]
    generation: dict[str, Any] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    tolerances: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions(VERSIONED))
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Lists the files of the folder and writes the manifest last."""
        self.files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != NAME
        }
        document = {"schema": SCHEMA, "ok": not self.failures, **asdict(self)}
        write_text(folder / NAME, json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            CheckpointError: there is none, it cannot be read, or it has another schema.
        """
        path = folder / NAME
        try:
            document = json.loads(path.read_text())
            if document.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            document.pop("ok")
            document["artifacts"] = [Artifact(**artifact) for artifact in document["artifacts"]]
            return cls(**document)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not the manifest of an export ({error}); give a folder that slimvlm export wrote"
            ) from error


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a manifest.

    Raises:
        CheckpointError: the name leaves the folder.
    """
    path = (folder / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder / NAME} names {name!r}, which lies outside its folder; do not use this export")
    return path


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the files of a manifest: missing, of another size, changed.

    Raises:
        CheckpointError: a name leaves the folder.
    """
    wrong = []
    for name, entry in files.items():
        path = inside(folder, name)
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, {entry['bytes']} expected")
        elif file_digest(path) != entry["sha256"]:
            wrong.append(f"{name} was changed (its sha256 differs)")
    return wrong
