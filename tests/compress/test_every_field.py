"""Any field of any JSON file we read may be gone or wrong: the file is refused by name, or it is read; no other end."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import GONE, VALUES, mutated, places, written
from profiles import example_profile
from report_runs import Story, write_run
from run_records import edit_record
from safetensors.torch import save_file

from slimvlm.compress.errors import SlimvlmError
from slimvlm.compress.files.decoding import read
from slimvlm.compress.models.checkpoint import check_weights
from slimvlm.compress.plan import Plan
from slimvlm.compress.recovery.training.history import History
from slimvlm.compress.recovery.training.state import STATE, StateFolder, load_best
from slimvlm.compress.run_record import options_of, read_record, record_text
from slimvlm.compress.runs import RunFolder
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.manifest import Manifest
from slimvlm.pipeline import recover_run
from slimvlm.serve.profiling import refuse_unless_profile
from slimvlm.serve.report import write_report
from slimvlm.serve.report.files import read_run

CASES = 100  # of every file, drawn by its name
REPORTS = 1  # of those that are read, so many are reported


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every file there is, made by the library's own writers."""
    out = write_run(tmp_path_factory.mktemp("run"), Story(profile=example_profile()))
    _write_export(out / "export")
    _write_checkpoint(out / "checkpoint")
    files = StateFolder(out / "training")
    weights = {"weight/a": torch.zeros(1)}
    best = files.save_best({"a": torch.zeros(1)}, 3)
    facts = History(steps=3, best=(0.5, -1.0), best_file=best)
    facts.add_step("task", 0.1, 10, 0.1)
    files.save(weights, {"facts": asdict(facts), "training": {"samples": 1}, "scaler": None}, 3, best)
    edit_record(out, lambda record: record["stages"].update(export=_finished(formats=["onnx"], checks=[CHECK])))
    edit_record(out, lambda record: record["stages"].update(profile=_finished(backends=["torch"])))
    return out


CHECK = {"format": "onnx", "variant": "fp32", "ok": True, "samples": 2, "equal": 2, "token_share": 1.0}
CHECK |= {"accuracy": None, "torch_accuracy": 0.5}


def _finished(**facts: Any) -> dict[str, Any]:
    return {"status": "finished", "seconds": 1.0, **facts}


def _write_export(folder: Path) -> None:
    folder.mkdir()
    (folder / "graph.onnx").write_bytes(b"x")
    port = {"name": "pixel_values", "dtype": "float32", "shape": ["batch_size", 3]}
    parity = {
        "case": "one",
        "shapes": {"pixel_values": [1, 3]},
        "max_absolute": 0.0,
        "max_relative": 0.0,
        "cosine": 1.0,
    }
    artifact = {
        "graph": "vision_encoder",
        "format": "onnx",
        "variant": "fp32",
        "file": "graph.onnx",
        "steps": None,
        "exporter": "dynamo",
    }
    artifact |= {"seconds": 1.0, "opset": 20, "fallback_reason": None, "fused_for": None, "ok": True}
    generation = {"kind": "decoder", "image_token": 9, "end": [2], "pad": 0, "positions": "count", "first_position": 0}
    manifest = Manifest(
        model={"family": "llava", "type": "llava", "digest": "ab", "source": "/there"},
        options={"max_new_tokens": 8, "formats": ["onnx"]},
        generation={**generation, "merge": 1, "start": None},
        run={"image_size": [8, 8], "external_data": {"graph.onnx": 1}, "prompt": {}, "image": {}, "note": "so"},
        tolerances={"fp32": {"relative": 1e-4, "cosine": 0.99, "tokens": 1.0}},
        checks=[CHECK],
    )
    manifest.write(folder)
    document = json.loads((folder / "manifest.json").read_text())
    document["artifacts"] = [{**artifact, "inputs": [port], "outputs": [port], "parity": [parity]}]
    (folder / "manifest.json").write_text(json.dumps(document))


def _write_checkpoint(folder: Path) -> None:
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "model-1.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    Manifest(model={}, options={}).write(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "files": files}))


def _open_export(run: Path) -> None:
    exported = Exported.open(run / "export")
    assert exported.manifest.generation is None or exported.manifest.generation.end is not None
    assert exported.image_size is None or len(exported.image_size) == 2


def _resume(run: Path) -> None:
    record = read_record(run)
    RunFolder(run, record["options"], resume=True)
    options_of(run, record)


READERS: dict[str, Callable[[Path], object]] = {
    "run.json": _resume,
    "plan.json": lambda run: read(run / "plan.json", Plan),
    "quality.json": read_run,
    "profile.json": lambda run: refuse_unless_profile(run / "profile.json"),
    "recovery.jsonl": read_run,
    "export/manifest.json": _open_export,
    "checkpoint/manifest.json": lambda run: check_weights(run / "checkpoint"),
    "checkpoint/model.safetensors.index.json": lambda run: check_weights(run / "checkpoint"),
    f"training/{STATE}": lambda run: load_best(torch.nn.ParameterDict({"a": torch.zeros(1)}), run / "training"),
}
SHOWN = ("run.json", "plan.json", "quality.json", "profile.json", "recovery.jsonl", "export/manifest.json")


def document_of(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def write(path: Path, document: Any) -> None:
    if path.suffix == ".jsonl":
        lines = document if isinstance(document, list) else [document]
        path.write_bytes(b"".join(written(line) + b"\n" for line in lines))
    elif path.name == "run.json" and isinstance(document, dict):
        try:
            path.write_text(record_text(document))  # with a digest that fits
        except ValueError:  # numbers that JSON has no words for
            path.write_bytes(written(document))
    else:
        path.write_bytes(written(document))


@pytest.mark.parametrize("name", READERS)
def test_a_field_that_is_gone_or_wrong_is_refused_by_file_and_field(run: Path, name: str) -> None:
    path = run / name
    before, content, draw = document_of(path), path.read_bytes(), random.Random(name)
    cases = [(place, value) for place in places(before) for value in VALUES]
    accepted = refused = 0
    try:
        READERS[name](run)
        for place, value in draw.sample(cases, min(CASES, len(cases))):
            write(path, mutated(before, place, value))
            try:
                READERS[name](run)
                accepted += 1
            except SlimvlmError as error:
                refused += 1
                assert path.name in str(error), (place, value, error)
                continue
            if name in SHOWN and accepted <= REPORTS:
                try:
                    write_report(run)
                except SlimvlmError as error:
                    assert str(error)
    finally:
        path.write_bytes(content)
    assert refused > accepted / 4


def test_a_command_that_reads_a_run_refuses_options_of_another_kind(run: Path) -> None:
    content = (run / "run.json").read_bytes()
    for name, value in (("seed", "1"), ("data", None), ("tower_ratio", {"vision": "x"}), ("ratio", GONE)):
        edit_record(run, lambda record: record.update(mutated(record, ("options", name), value)))  # noqa: B023
        with pytest.raises(SlimvlmError, match=rf"run\.json.*{name}"):
            recover_run(run, {})
        (run / "run.json").write_bytes(content)
