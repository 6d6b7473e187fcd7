"""The files of a run folder that a report is made of. A file counts only where run.json says its stage is finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from slimvlm.compress.errors import CheckpointError, OutputError
from slimvlm.compress.evaluation.quality import Comparison, Quality, qualities_of
from slimvlm.compress.files.decoding import content_of, decode, parse
from slimvlm.compress.files.folders import MANIFEST as MANIFEST_NAME
from slimvlm.compress.files.writing import file_digest
from slimvlm.compress.plan import Plan
from slimvlm.compress.run_record import read_record
from slimvlm.compress.runs import EXPORT, FIT, FRONTIER, JOURNAL, PLAN, PROFILE, QUALITY, SCORES
from slimvlm.export.running.manifest import Manifest
from slimvlm.serve.fitting.record import Fit
from slimvlm.serve.frontier.frontier import Frontier
from slimvlm.serve.profile import Profile

MANIFEST = f"{EXPORT}/{MANIFEST_NAME}"
MODELS = ("dense", "cut", "slim")  # before; cut but not recovered; what was delivered

Read = TypeVar("Read")
Facts = dict[str, Any]  # what run.json says of a stage, or a line of a journal: JSON, as each stage writes it


class StepLine(TypedDict):
    """A line of recovery.jsonl: an optimiser step; no loss if it was skipped."""

    step: int
    stage: str
    loss: float | None


class ValidationLine(TypedDict):
    """A line of recovery.jsonl: a validation, (score, minus loss)."""

    step: int
    validation: tuple[float | None, float | None]
    best: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """`scores.safetensors`: one importance per unit and group; `criterion` made them."""

    criterion: str
    values: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Qualities:
    """`quality.json`: the models that were evaluated, by the names of MODELS, dense against slim, and dense blind;
    `rounded`: slim with the weights of the variant it was trained for."""

    models: Mapping[str, Quality]
    comparison: Comparison
    blind: Quality | None = None
    rounded: Quality | None = None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run folder holds; None for what is not there (yet).

    Attributes:
        record: run.json.
        digests: sha256 and bytes of the files read, besides run.json.
        journal: lines of recovery.jsonl.
    """

    folder: Path
    record: Facts
    digests: Mapping[str, tuple[str, int]]
    plan: Plan | None = None
    scores: Scored | None = None
    journal: list[Facts] | None = None
    fit: Fit | None = None
    quality: Qualities | None = None
    manifest: Manifest | None = None
    profile: Profile | None = None
    frontier: Frontier | None = None

    def stage(self, name: str) -> Facts:
        """What run.json says of a stage; nothing where it never began."""
        stage: Facts = self.record["stages"].get(name, {})
        return stage


def read_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        OutputError: it holds no run, or a file of a finished stage is missing or damaged.
    """
    record = read_record(folder)
    finished = {name for name, stage in record["stages"].items() if stage.get("status") == "finished"}
    status = record["stages"].get("recover", {}).get("status")
    journal = {"finished": JOURNAL, "running": f"recovery/{JOURNAL}"}.get(status)  # moved up when it is finished
    wanted: dict[str, tuple[str, bool, Callable[[Path], object]]] = {
        "plan": (PLAN, bool({"plan", "fit"} & finished), lambda path: decode(parse(content_of(path)), Plan)),
        "scores": (SCORES, "plan" in finished, _read_scores),
        "fit": (FIT, "fit" in finished, lambda path: decode(parse(content_of(path)), Fit)),
        "quality": (QUALITY, "evaluate" in finished, _read_quality),
        "manifest": (MANIFEST, (folder / MANIFEST).is_file(), lambda path: Manifest.read(path.parent)),
        "profile": (PROFILE, (folder / PROFILE).is_file(), lambda path: decode(parse(content_of(path)), Profile)),
        "frontier": (FRONTIER, (folder / FRONTIER).is_file(), lambda path: decode(parse(content_of(path)), Frontier)),
    }
    if journal is not None:
        wanted["journal"] = (journal, "recover" in finished or (folder / journal).is_file(), _read_journal)
    there = {field: (name, reader) for field, (name, is_there, reader) in wanted.items() if is_there}
    read: dict[str, Any] = {
        field: _read(folder, name, reader) for field, (name, reader) in there.items()
    }  # as `wanted`
    return RunFiles(folder, record, {name: _digest(folder / name) for name, _ in there.values()}, **read)


def _read(folder: Path, name: str, reader: Callable[[Path], Read]) -> Read:
    try:
        return reader(folder / name)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, CheckpointError) as error:
        raise OutputError(
            f"{folder / name} cannot be read ({error}); run the command that wrote it again, or remove {folder / name} "
            "if it was put there by hand"
        ) from None


def _read_scores(path: Path) -> Scored:
    with safe_open(path, "numpy") as file:
        criterion = json.loads((file.metadata() or {})["criterion"])["name"]
        names = [name for name in file.keys() if name.startswith("values/")]  # noqa: SIM118 (not a mapping)
        return Scored(criterion, {name.removeprefix("values/"): file.get_tensor(name) for name in names})


def _read_journal(path: Path) -> list[Facts]:
    """The lines; one that a killed process left half-written is dropped."""
    lines = content_of(path).split(b"\n")[:-1]
    return [_line(parse(line), f"line {number}") for number, line in enumerate(lines, start=1)]


def _line(line: Facts, where: str) -> Facts:
    return dict(decode(line, ValidationLine if "validation" in line else StepLine, where))


def _read_quality(path: Path) -> Qualities:
    document = qualities_of(parse(content_of(path)))
    models = {name: document[name] for name in MODELS if name in document}
    return Qualities(models, document["comparison"], document.get("blind"), document.get("rounded"))


def _digest(path: Path) -> tuple[str, int]:
    return file_digest(path), path.stat().st_size
