"""`run.json`: what it must hold to be believed. It carries a digest of itself, so that no other file passes for one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from slimvlm.compress.errors import OutputError
from slimvlm.compress.files.decoding import MisfitError, content_of, decode, dump, parse, refused_as
from slimvlm.compress.options import CompressOptions

RECORD = "run.json"
SCHEMA = 1
# Any in this file: the values of JSON, until `decode` has seen them.
ADVICE = "give the folder of a run of this version, or start again in another folder"


class StageRecord(TypedDict):
    """A stage that was begun."""

    status: Literal["running", "finished"]


class Finished(StageRecord):
    """A stage that is done."""

    seconds: float


class PlanFacts(TypedDict, total=False):
    """Of the plan stage."""

    model_digest: str
    data_digest: str
    calibration_samples: int
    left_out_samples: int
    bad_samples: list[str]


class FitBegun(TypedDict):
    """A search for what meets targets, among the precisions `backends`."""

    targets: list[str]
    backends: list[str]


class FitFacts(FitBegun, total=False):
    """And what was found: how much of all parameters goes, in which of them, after so many trials."""

    ratio: float
    backend: str
    trials: int


class SliceFacts(TypedDict, total=False):
    """Of the slice stage: relative differences, and what the cut and the refit left."""

    masked_difference: float
    reload_difference: float
    output_lost_by_cut: float
    output_lost: float


class Training(TypedDict):
    """One stage of a training."""

    name: str
    steps: int
    seconds: float
    tokens: int
    first_loss: float | None
    last_loss: float | None


class RecoverOptioned(TypedDict):
    """A recovery that was begun."""

    options: dict[str, Any]


class RecoverFacts(RecoverOptioned, total=False):
    """And how much merging and saving changed the outputs."""

    merged_difference: float
    reload_difference: float


class RecoverFinished(Finished):
    """A recovery that is done: its history."""

    steps: int
    tokens: int
    tokens_per_second: float
    skipped: int
    best_step: int
    best: tuple[float, float] | None
    first: tuple[float, float] | None
    last: tuple[float, float] | None
    stopped_early: bool
    helped: bool
    peak_memory_bytes: int
    stages: list[Training]
    samples: int


class EvaluateFacts(TypedDict, total=False):
    """Of the evaluation."""

    samples: int
    held_out: bool


class ExportBegun(TypedDict):
    """An export."""

    formats: list[str]


class ExportFacts(ExportBegun, total=False):
    """Of the export stage; `failed` or `refused` say why there is none to use."""

    variants: list[str]
    failed: str
    refused: str
    checks: list[Check]


class ProfileBegun(TypedDict):
    """A profile."""

    backends: list[str]


class ProfileFacts(ProfileBegun, total=False):
    """Of the profile stage."""

    refused: str


FACTS: Mapping[str, type] = {  # of a stage, from its begin; a TypedDict each
    "plan": PlanFacts,
    "fit": FitFacts,
    "slice": SliceFacts,
    "recover": RecoverFacts,
    "evaluate": EvaluateFacts,
    "export": ExportFacts,
    "profile": ProfileFacts,
    "frontier": ProfileFacts,
}


class Record(TypedDict):
    """The whole file; `options` is what identifies the run."""

    command: list[str]
    options: dict[str, Any]
    stages: dict[str, StageRecord]
    versions: dict[str, str]
    schema: Literal[1]
    digest: str


def record_text(record: Mapping[str, Any]) -> str:
    """The file of a record, with its digest."""
    plain = parse(dump(record))  # as it will be read
    return dump({**plain, "digest": _digest(plain)}, indent=2, sort_keys=True) + "\n"


def read_record(path: Path) -> dict[str, Any]:
    """The record of the run in the folder `path`.

    Raises:
        OutputError: there is no run, or its record is not as this version wrote it (the field is named).
    """
    if not (path / RECORD).is_file():
        raise OutputError(f"{path} holds no run of slimvlm; give the folder that `slimvlm compress` wrote")
    with refused_as(path / RECORD, OutputError, ADVICE):
        record: dict[str, Any] = dict(decode(parse(content_of(path / RECORD)), Record))
        for name, stage in record["stages"].items():
            decode(stage, FACTS.get(name, StageRecord), f"stages.{name}")
            if stage["status"] == "finished":
                decode(stage, RecoverFinished if name == "recover" else Finished, f"stages.{name}")
        if record.pop("digest") != _digest(record):
            raise MisfitError("it was changed since it was written (its digest differs)")
    if "refit" in record["options"]:  # its name when there was one compensation, and one schedule of rounds
        record["options"]["compensation"] = "refit" if record["options"].pop("refit") else "none"
        record["options"]["equal_rounds"] = False
    if "allocator" in record["options"]:
        record["options"].setdefault("cost", "parameters")  # which was all there was
        record["options"].setdefault("compensate_rounds", False)
        record["options"].setdefault("depth_ratio", {})
        record["options"].setdefault("guard", False)
    return record


def options_of(path: Path, record: Mapping[str, Any], **changes: Any) -> CompressOptions:
    """The options of the run in `path`, with `changes`, to go on with it.

    Raises:
        OutputError: its record holds others (the field is named).
    """
    with refused_as(path / RECORD, OutputError, ADVICE):
        return CompressOptions.of_run(path, record["options"], **changes)


def replayed(record: Mapping[str, Any]) -> dict[str, Any]:
    """All that was asked of the run, by the names of the options; what was left open is absent."""
    stages = record["stages"]
    trained = {"recover": "none"} if "evaluate" in stages else {}
    asked = {**record["options"], **stages.get("recover", {}).get("options", trained), **outputs_of(record)}
    return {name: value for name, value in asked.items() if value is not None}


def outputs_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The formats, precisions, targets and measurements that were asked of the run, as far as it came."""
    stages, asked = record["stages"], dict[str, Any]()
    if exported := stages.get("export"):
        asked |= {"export": tuple(exported["formats"]), "variants": tuple(exported.get("variants", ()))}
    if fitted := stages.get("fit"):
        names = [name.partition(":") for name in fitted["backends"]]
        asked |= {"target": tuple(fitted["targets"]), "backend": names[0][0]}
        asked["variants"] = tuple(variant for _, _, variant in names if variant)
    if "profile" in stages:
        asked["profile"] = bool(stages["profile"]["backends"])
    return asked


def _digest(record: Mapping[str, Any]) -> str:
    """Of all but the digest itself."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(dump(rest, sort_keys=True).encode()).hexdigest()


class Logits(TypedDict, total=False):
    """Logits of the answers, and whether these were given to torch; exports made before 0.1.0 was released say nothing
    of them.
    """

    loss: float | None
    torch_loss: float
    divergence: float | None
    max_relative: float | None
    cosine: float | None
    long_prompt: int
    window: int
    forced: bool


class Check(Logits):
    """Greedy answers of one format and variant against torch's."""

    format: str
    variant: str
    ok: bool
    samples: int
    equal: int
    token_share: float
    accuracy: float | None
    torch_accuracy: float | None
