"""Finished runs in milliseconds: folders written by the library's own writers, with figures that are easy to check."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from run_records import edit_record

from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import Scores
from slimvlm.compress.evaluation.quality import Row, compare, exact_match, summarize
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan, TowerCount
from slimvlm.compress.recovery.training.choice import Validation
from slimvlm.compress.recovery.training.history import History, Journal
from slimvlm.compress.runs import RunFolder
from slimvlm.serve.profile import Profile

MODELS = ("dense", "cut", "slim")
PARTS = (("attn", 4), ("mlp", 16))
VALIDATIONS = {0: (0.25, -2.0), 4: (0.5, -1.0), 8: (0.75, -0.5)}


@dataclass(frozen=True, kw_only=True)
class Story:
    """What a run is about. Every text may be anything.

    Attributes:
        tasks: task -> how many of its eight questions dense, cut and slim answer right.
        wrong: what is answered where the answer is not right.
        validations: step -> (score, -loss) of the recovery.
        blind: task -> how many dense answers right with the images shuffled; None: that was not measured.
        profile: what profile.json says; None: there is none.
    """

    model: str = "models/small"
    tasks: dict[str, tuple[int, int, int]] = field(default_factory=lambda: {"colour": (8, 2, 7), "count": (8, 0, 1)})
    vendors: tuple[str, str] = ("photos", "drawings")
    answer: str = "red"
    question: str = "what colour ?"
    wrong: str = "blue"
    towers: tuple[str, str] = ("vision", "language")
    stages: tuple[str, str] = ("vision shallow", "task")
    bad_samples: tuple[str, ...] = ()
    validations: dict[int, tuple[float, float]] = field(default_factory=lambda: dict(VALIDATIONS))
    held_out: bool = True
    blind: dict[str, int] | None = None
    version: str = "1.0"
    profile: Profile | None = None


def write_run(folder: Path, story: Story) -> Path:
    """A run folder `run` with its samples beside it, all stages finished."""
    data = _write_samples(folder, story)
    out = folder / "run"
    options = CompressOptions(model=story.model, out=out, data=data, eval_data=data, device="cpu", rounds=1)
    run = RunFolder(out, options.identity())
    run.record["command"] = ["slimvlm", "compress", story.model, "run", "--data", str(data)]
    run.record["versions"] = {"slimvlm": story.version}
    with run.begun():
        _write_stages(run, options, story)
    return out


def _write_stages(run: RunFolder, options: CompressOptions, story: Story) -> None:
    out = run.path
    with run.stage("plan") as facts:
        facts.update(model_digest="ab" * 32, data_digest="cd" * 32, calibration_samples=8)
        facts["bad_samples"] = list(story.bad_samples)
        write_text(out / "plan.json", _plan(story).to_json())
        _scores(story).save(out / "scores.safetensors")
    with run.stage("slice") as facts:
        facts.update(masked_difference=1.5e-7, reload_difference=0.0)
    with run.stage("recover", options=options.recovery_identity()) as facts:
        facts.update(_train(out, story), merged_difference=2.5e-7, reload_difference=0.0, samples=64)
    with run.stage("evaluate") as facts:
        facts.update(samples=8 * len(story.tasks), held_out=story.held_out)
        _write_quality(out, story)
    if story.profile is not None:
        write_text(out / "profile.json", story.profile.to_json())


def change_record(run: Path, stage: str, **changes: Any) -> None:
    """Change what run.json says of a stage; None takes a field away."""

    def change(record: dict[str, Any]) -> None:
        facts = {**record["stages"][stage], **changes}
        record["stages"][stage] = {name: value for name, value in facts.items() if value is not None}

    edit_record(run, change)


def _write_samples(folder: Path, story: Story) -> Path:
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, task in enumerate(task for task in story.tasks for _ in range(8)):
        Image.new("RGB", (40, 30), (20 * number % 256, 90, 120)).save(folder / "images" / f"{number}.png")
        record = {"image": f"images/{number}.png", "question": story.question, "answer": story.answer, "task": task}
        lines.append(json.dumps({**record, "vendor": story.vendors[number % 2]}))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def _plan(story: Story) -> Plan:
    """Two layers per tower; heads and channels that stay: 3 of 4 and 6 of 16, then 2 of 4 and 4 of 16."""
    sizes = {f"{tower}.{layer}.{part}": size for tower in story.towers for layer in (0, 1) for part, size in PARTS}
    kept = {"0.attn": 3, "0.mlp": 6, "1.attn": 2, "1.mlp": 4}
    return Plan(
        family="llava",
        model_digest="ab" * 32,
        criterion="gate",
        allocator="global",
        layout="per-layer",
        attention_unit="auto",
        rounds=1,
        seed=0,
        ratio=0.5,
        calibration_digest="cd" * 32,
        parameters_before=2_000_000,
        parameters_after=1_000_000,
        towers={tower: TowerCount(900_000, 400_000, 800_000, 300_000) for tower in story.towers},
        sizes=sizes,
        keep={key: tuple(range(kept[".".join(key.rsplit(".", 2)[1:])])) for key in sizes},
        options={},
    )


def _scores(story: Story) -> Scores:
    plan = _plan(story)
    values = {key: 10.0 ** -torch.arange(size).float() for key, size in plan.sizes.items()}
    return Scores(CRITERIA["gate"], values, {key: torch.arange(len(value))[:, None] for key, value in values.items()})


def _train(out: Path, story: Story) -> dict[str, Any]:
    """Eight steps in two stages, the third skipped; what the recover stage records of them."""
    facts, journal = History(peak_memory_bytes=2**30), Journal(out, 0, True)
    for step in range(9):
        if step:
            stage, loss = story.stages[step > 4], None if step == 3 else 1.0 / step
            facts.add_step(stage, loss, 100, 0.5)
            facts.skipped += loss is None
            found = {"loss": None, "skipped": True} if loss is None else {"loss": loss, "parts": {}, "grad_norm": 1.0}
            journal.write({"step": step, "stage": stage, "lr": 1e-3} | found | {"tokens_per_second": 200.0})
        if step in story.validations:
            score = story.validations[step]
            keep = facts.add_validation(Validation(score, score), last_stage=False)
            journal.write({"step": step, "validation": list(score), "best": keep, "seconds": 0.1})
    journal.close()
    return facts.to_dict()


def _write_quality(out: Path, story: Story) -> None:
    qualities = {}
    rights = {name: {task: right[place] for task, right in story.tasks.items()} for place, name in enumerate(MODELS)}
    for name, right in {**rights, **({} if story.blind is None else {"blind": story.blind})}.items():
        rows = []
        for task in story.tasks:
            for number in range(8):
                said = story.answer if number < right[task] else story.wrong
                exact = exact_match(said, [story.answer])
                identity, vendor = f"samples.jsonl:{len(rows) + 1}", story.vendors[len(rows) % 2]
                rows.append(Row(identity, task, vendor, said, exact, exact, loss=2.0 - exact, tokens=2))
        qualities[name] = summarize("generation", rows, blind=name == "blind", seconds=1.0)
    document = {name: quality.to_dict() for name, quality in qualities.items()}
    document["comparison"] = compare(qualities["dense"], qualities["slim"]).to_dict()
    write_text(out / "quality.json", json.dumps(document))
