"""The plan stage of a run: `plan.json` and `scores.safetensors`; a killed one continues after its last round."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimvlm.compress import processes
from slimvlm.compress.budget import Budget
from slimvlm.compress.calibrate import CalibrationOptions
from slimvlm.compress.collate import Collator, collated
from slimvlm.compress.computing import load_to_compute
from slimvlm.compress.criteria import CRITERIA, Criterion
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.files import write_text
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.rounds import Planned, Planning, plan_in_rounds
from slimvlm.compress.runs import RunFolder
from slimvlm.compress.splits import Measured

Progress = Callable[..., None]  # stage, done, total, note


def chosen_criterion(options: CompressOptions) -> Criterion:
    """The criterion with the asked ablations applied.

    Raises:
        UnsuitableOptionError: a Taylor variant of a criterion that is no Taylor expansion.
    """
    criterion = CRITERIA[options.criterion]
    if options.taylor is not None and criterion.saliency != "first":
        raise UnsuitableOptionError(
            f"--taylor {options.taylor} is a variant of the criteria ukmi or taylor, not of {criterion.name}; "
            "choose one of them with --criterion, or leave --taylor out"
        )
    changes: dict[str, Any] = {}
    if options.threshold is not None:
        changes["threshold"] = None if options.threshold >= 1 else options.threshold
    if options.entropy is not None:
        changes["entropy"] = options.entropy
    if options.taylor is not None:
        changes["saliency"] = options.taylor
    return replace(criterion, **changes)


def planning_of(options: CompressOptions, **identity: str) -> Planning:
    """The options of the plan stage in the library's terms."""
    criterion = chosen_criterion(options)
    return Planning(
        budget=Budget(
            ratio=options.ratio,
            tower_ratio=dict(options.tower_ratio),
            kind_ratio=dict(options.kind_ratio),
            round_channels=options.round_channels,
            allocator=options.allocator,
            faithful=options.faithful,
            layout=options.layout,
        ),
        calibration=CalibrationOptions(
            criterion=criterion,
            grad_memory_bytes=options.grad_memory,
            host_sums=options.host_sums,
            faithful=options.faithful,
        ),
        rounds=options.rounds,
        attention_unit=options.attention_unit,
        seed=options.seed,
        identity=identity,
    )


def plan_stage(run: RunFolder, options: CompressOptions, data: Measured, progress: Progress) -> Plan:
    """The plan of this or an earlier process. Every process of the run calls it."""
    path = options.out / "plan.json"
    if run.finished("plan"):
        return Plan.from_json(path.read_text())
    partial = options.out / "plan.partial.json"
    with run.stage("plan") as facts:
        loaded = load_to_compute(options, options.model)
        collator = Collator(loaded.processor, loaded.family, loaded.model.config)
        done = _finished_rounds(partial)

        def keep(planned: Planned) -> None:
            document = {"round": planned.round, "plan": planned.plan.to_json()}
            if planned.round < options.rounds and run.writer:
                write_text(partial, json.dumps(document))

        planned = plan_in_rounds(
            loaded.model,
            lambda _: collated(collator, data.calibration, options.batch_size),
            planning_of(options, model_digest=loaded.digest, calibration_digest=data.digest),
            done=done,
            on_round=keep,
            progress=progress,
        )
        facts.update(model_digest=loaded.digest, data_digest=data.digest, calibration_samples=len(data.calibration))
        facts["left_out_samples"] = data.left_out
        facts["bad_samples"] = [f"{bad.name}: {bad.reason}" for bad in data.bad]
        if run.writer:
            planned.scores.save(options.out / "scores.safetensors")
            write_text(path, planned.plan.to_json())
            partial.unlink(missing_ok=True)
    processes.wait_for_all()
    return planned.plan


def _finished_rounds(partial: Path) -> tuple[int, Plan] | None:
    if not partial.is_file():
        return None
    document = json.loads(partial.read_text())
    return document["round"], Plan.from_json(document["plan"])
