"""`manifest.json` of an export: every file with size and sha256, every graph with its ports, exporter and parity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.files.decoding import content_of, decode, dump, parse, refused_as
from slimvlm.compress.files.folders import MANIFEST, FileEntry, list_files
from slimvlm.compress.files.writing import file_digest, installed_versions, real, write_text
from slimvlm.compress.run_record import Check
from slimvlm.export.running.generation import PortInfo, Prompting
from slimvlm.export.variants import FULL, VARIANTS

SAMPLE = "sample.safetensors"
SCHEMA = 1
VERSIONED = ("slimvlm", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")

Document = dict[str, Any]  # JSON whose fields others fix: a config, a record, a recipe for `run_onnx.py`


class Parity(TypedDict):
    """Difference of one case against torch; None where it is no finite number."""

    case: str
    shapes: dict[str, list[int]]
    max_absolute: float | None
    max_relative: float | None
    cosine: float | None


class OfModel(TypedDict):
    """What every export says of its model."""

    family: str
    type: str


class Origin(OfModel, total=False):
    """What was exported."""

    source: str
    digest: str


class Stated(TypedDict):
    """The options of the export, as far as a reader needs them."""

    max_new_tokens: int


class ForClients(TypedDict, total=False):
    """What a client needs besides the graphs; `prompt` and `image` are the recipe of `run_onnx.py`."""

    image_size: tuple[int, int]
    external_data: dict[str, int]
    prompt: Document
    image: Document
    why_not: str
    note: str


@dataclass(slots=True)
class Artifact:
    """One graph in one format and variant.

    Attributes:
        file: relative to the folder, with `/`.
        parity: differences against torch, one per case.
        steps: largest distance of a rounded weight from the model's; see `largest_shift`.
    """

    graph: str
    format: Annotated[str, Literal["onnx", "torchscript", "pt2", "aoti"]]
    variant: Annotated[str, Literal[tuple(VARIANTS)]]
    file: str
    exporter: str
    seconds: float
    opset: int | None = None
    fallback_reason: str | None = None
    fused_for: str | None = None
    steps: float | None = None
    inputs: list[PortInfo] = field(default_factory=list)
    outputs: list[PortInfo] = field(default_factory=list)
    parity: list[Annotated[Document, Parity]] = field(default_factory=list)
    ok: bool = True

    @property
    def backend(self) -> str:
        """What runs it, as `slimvlm profile --backend` has it: `onnx`, `onnx:int8`, `torchscript`, `pt2`."""
        return self.format if self.variant == FULL else f"{self.format}:{self.variant}"


@dataclass(slots=True)
class Manifest:
    """What an export holds; `generation` is none for a dual encoder, `checks` are of whole generations, `failures` say
    what is wrong, `run` is for clients.
    """

    model: Annotated[Document, Origin]
    options: Annotated[Document, Stated]
    generation: Prompting | None = None
    run: Annotated[Document, ForClients] = field(default_factory=dict)
    tolerances: dict[str, dict[str, float]] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    checks: list[Annotated[Document, Check]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions(VERSIONED))
    files: dict[str, FileEntry] = field(default_factory=dict)
    ok: bool = True
    schema: int = SCHEMA

    @property
    def graphs(self) -> dict[str, list[Artifact]]:
        """The artifacts by what runs them: those of one format and variant together."""
        found: dict[str, list[Artifact]] = {}
        for artifact in self.artifacts:
            found.setdefault(artifact.backend, []).append(artifact)
        return found

    def write(self, folder: Path) -> None:
        """Lists the files of the folder and writes the manifest last."""
        self.ok = not self.failures
        self.files = list_files(folder)
        write_text(folder / MANIFEST, dump(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            CheckpointError: there is none, it cannot be read, or it has another schema.
        """
        advice = "give a folder that slimvlm export wrote"
        with refused_as(folder / MANIFEST, CheckpointError, advice):
            return decode(parse(content_of(folder / MANIFEST)), cls)


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a manifest.

    Raises:
        CheckpointError: the name leaves the folder.
    """
    path = real(folder / name)
    if Path(name).is_absolute() or not path.is_relative_to(real(folder)):
        raise CheckpointError(
            f"{folder / MANIFEST} names {name!r}, which lies outside its folder; do not use this export"
        )
    return path


def check_files(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
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
