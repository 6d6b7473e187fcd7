"""The one job: plan, cut, recover, evaluate, report, in order; every stage is resumable and nothing here is clever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slimvlm.compress import processes
from slimvlm.compress.budget import Budget
from slimvlm.compress.calibrate import CalibrationOptions
from slimvlm.compress.checkpoint import load_model, save_checkpoint
from slimvlm.compress.collate import Batch, Collator
from slimvlm.compress.computing import CHECKED_SAMPLES, TOLERANCE, cast, load_to_compute, outputs, relative_difference
from slimvlm.compress.criteria import CRITERIA, Criterion
from slimvlm.compress.errors import CheckFailedError, CheckpointError, UnsuitableOptionError
from slimvlm.compress.evaluate import Comparison, Quality, compare, evaluate
from slimvlm.compress.groups import find_groups
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.recovery.recipe import parse_recipe
from slimvlm.compress.recovery.stage import CUT, recover_stage
from slimvlm.compress.refit import refit
from slimvlm.compress.rounds import Planned, Planning, plan_in_rounds
from slimvlm.compress.runs import RunFolder, read_identity, write_text
from slimvlm.compress.samples import Sample, batches
from slimvlm.compress.slicing import apply_plan, mask_plan
from slimvlm.compress.splits import Measured, read_evaluation, read_measured

Progress = Callable[..., None]  # stage, done, total, note: what else is worth saying


@dataclass(frozen=True)
class Result:
    """What one run gave; everything is also in files of the run folder."""

    out: Path
    plan: Plan
    comparison: Comparison | None
    seconds: dict[str, float]
    bad_samples: int
    dense: Quality | None = None
    slim: Quality | None = None
    cut: Quality | None = None  # before the recovery, where there was one
    recovery: dict[str, Any] | None = None  # what the recover stage recorded


def compress(options: CompressOptions, progress: Progress | None = None) -> Result:
    """The whole job.

    Raises:
        SlimvlmError: refused, with the reason (exit code 3).
        CheckFailedError: the result was made, but a check on it failed; files are kept (exit code 4).
    """
    options = options.resolved()
    if options.recover != "none":
        parse_recipe(options.recover)  # a mistake in it is not worth the minutes until it is needed
    processes.join()
    try:
        return _compress(options, progress or _silent)
    finally:
        processes.leave()


def make_plan(options: CompressOptions, progress: Progress | None = None) -> Result:
    """The plan stage alone: `plan.json` and `scores.safetensors`; `compress --resume` goes on from there."""
    return compress(replace(options, stages=("plan",)), progress)


def apply_saved_plan(model: str, plan_file: Path, out: Path, trust_remote_code: bool = False) -> Plan:
    """Cut `model` by the plan in `plan_file` and save the checkpoint in `out`.

    Raises:
        CheckpointError: the plan is unreadable, or was made for other weights.
    """
    try:
        plan = Plan.from_json(plan_file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{plan_file} is not a readable plan: {error}") from None
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    if loaded.digest != plan.model_digest:
        raise CheckpointError(
            f"{plan_file} was made for other weights than {model} "
            f"({plan.model_digest[:12]} is not {loaded.digest[:12]}); make a plan for this checkpoint"
        )
    apply_plan(loaded.model, plan)
    save_checkpoint(out, loaded.model, loaded.processor, plan, plan.layout)
    return plan


def recover_run(out: Path, changes: Mapping[str, Any], progress: Progress | None = None) -> Result:
    """Recover the model of the finished run in `out` (again), with the recovery options in `changes`.

    Raises:
        OutputError: `out` holds no run.
        SlimvlmError, CheckFailedError: as `compress`.
    """
    return compress(CompressOptions.of_run(out, read_identity(out), **changes), progress)


def evaluate_checkpoint(
    options: CompressOptions, against: str | None = None, progress: Progress | None = None
) -> tuple[Quality, Comparison | None]:
    """Quality of `options.model` on `options.data`, and compared with the checkpoint `against` when one is given."""
    samples = read_evaluation(options)
    quality = _evaluate(options, options.model, samples, progress or _silent)
    if against is None:
        return quality, None
    return quality, compare(_evaluate(options, against, samples, progress or _silent), quality, options.seed)


def _compress(options: CompressOptions, progress: Progress) -> Result:
    run = _open_run(options)
    data = read_measured(options)
    plan = _plan_stage(run, options, data, progress)
    if options.stages == ("plan",):
        return Result(options.out, plan, None, {}, len(data.bad))
    if run.writer:
        _slice_stage(run, options, plan, data, progress)
    processes.wait_for_all()
    recovery = recover_stage(run, options, plan, data, progress)
    if not run.writer:
        return Result(options.out, plan, None, {}, len(data.bad))
    dense, cut, slim = _evaluate_stage(run, options, data, progress)
    comparison = compare(dense, slim, options.seed)
    seconds = {name: stage["seconds"] for name, stage in run.record["stages"].items()}
    result = Result(options.out, plan, comparison, seconds, len(data.bad), dense, slim, cut, recovery)
    from slimvlm.serve.report import write_report  # matplotlib takes a second to import

    write_report(options.out)
    _check_quality(options, result)
    return result


def _open_run(options: CompressOptions) -> RunFolder:
    """The first process opens (and perhaps empties) the folder, then the others join it."""
    if processes.rank() == 0:
        run = RunFolder(options.out, options.identity(), resume=options.resume, overwrite=options.overwrite)
    processes.wait_for_all()
    if processes.rank() > 0:
        run = RunFolder(options.out, options.identity(), resume=True, writer=False)
    return run


# ------------------------------------------------------------------ plan


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


def _plan_stage(run: RunFolder, options: CompressOptions, data: Measured, progress: Progress) -> Plan:
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
            lambda _: _collated(collator, data.calibration, options.batch_size),
            planning_of(options, model_digest=loaded.digest, calibration_digest=data.digest),
            done=done,
            on_round=keep,
            progress=progress,
        )
        facts.update(model_digest=loaded.digest, data_digest=data.digest, calibration_samples=len(data.calibration))
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


def _collated(collator: Collator, samples: Sequence[Sample], batch_size: int) -> list[Callable[[], Batch]]:
    """One function per batch: a batch is made when it is read, and not kept."""
    return [partial(collator.training, batch) for batch in batches(samples, batch_size)]


# ------------------------------------------------------------------ slice, save


def _slice_stage(run: RunFolder, options: CompressOptions, plan: Plan, data: Measured, progress: Progress) -> None:
    """Cut, check the cut against the masked dense model, refit what is left to it, save, and check the checkpoint."""
    if run.finished("slice"):
        return
    with run.stage("slice") as facts:
        for name in ("model", "cut"):  # of a process that died before it could say finished
            shutil.rmtree(options.out / name, ignore_errors=True)
        loaded = load_to_compute(options, options.model)
        model = loaded.model
        stored, computed = model.config.dtype, model.dtype
        collator = Collator(loaded.processor, loaded.family, model.config)
        batch = collator.training(data.calibration[:CHECKED_SAMPLES])
        fitted = None
        if options.refit:
            groups = find_groups(model, loaded.family, plan.attention_unit)
            work = _collated(collator, data.calibration, options.batch_size)
            fitted = refit(model, loaded.family, groups, plan.keep, work, memory=options.grad_memory, progress=progress)
            facts.update(output_lost_by_cut=fitted.lost_by_cut, output_lost=fitted.lost)
        masked = outputs(mask_plan(model, plan), batch)
        facts["masked_difference"] = relative_difference(masked, outputs(apply_plan(model, plan), batch))
        if fitted is not None:
            fitted.put_into(model)
        save_checkpoint(options.out / "model", cast(model, stored), loaded.processor, plan, options.layout)
        sliced = outputs(cast(model, computed), batch)
        reloaded = load_to_compute(options, str(options.out / "model"))
        facts["reload_difference"] = relative_difference(sliced, outputs(reloaded.model, batch))
        _require_equal(facts, computed, options.out)


def _require_equal(facts: dict[str, Any], dtype: torch.dtype, out: Path) -> None:
    if facts["masked_difference"] > TOLERANCE[dtype]:
        raise CheckFailedError(
            f"{out / 'model'}: the cut model differs from the masked dense model by {facts['masked_difference']:.2e} "
            f"(relative; accepted {TOLERANCE[dtype]:.0e}); please report this model"
        )
    if facts["reload_difference"] > 0:
        raise CheckFailedError(
            f"{out / 'model'}: the reloaded checkpoint differs from what was saved by "
            f"{facts['reload_difference']:.2e}; please report this model"
        )


# ------------------------------------------------------------------ evaluate


def _evaluate_stage(
    run: RunFolder, options: CompressOptions, data: Measured, progress: Progress
) -> tuple[Quality, Quality | None, Quality]:
    """Quality of the dense, the cut (where a recovery followed) and the slim model on the same questions."""
    path = options.out / "quality.json"
    if run.finished("evaluate"):
        document = json.loads(path.read_text())
        read = {name: Quality.from_dict(document[name]) for name in ("dense", "cut", "slim") if name in document}
        return read["dense"], read.get("cut"), read["slim"]
    with run.stage("evaluate") as facts:
        facts.update(samples=len(data.evaluation), held_out=data.held_out)
        folders = {"dense": options.model, "cut": options.out / CUT, "slim": options.out / "model"}
        if not (options.out / CUT).is_dir():
            del folders["cut"]
        found = {name: _evaluate(options, str(folder), data.evaluation, progress) for name, folder in folders.items()}
        comparison = compare(found["dense"], found["slim"], options.seed).to_dict()
        document = {**{name: quality.to_dict() for name, quality in found.items()}, "comparison": comparison}
        write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")
    return found["dense"], found.get("cut"), found["slim"]


def _evaluate(options: CompressOptions, name: str, samples: Sequence[Sample], progress: Progress) -> Quality:
    loaded = load_to_compute(options, name)
    collator = Collator(loaded.processor, loaded.family, loaded.model.config)
    return evaluate(
        loaded.model,
        collator,
        samples,
        batch_size=options.batch_size * 4,
        progress=lambda done, total: progress("evaluate", done, total),
    )


def _check_quality(options: CompressOptions, result: Result) -> None:
    limit, drop = options.max_quality_drop, 100 * result.comparison.drop
    if limit is not None and drop > limit:
        raise CheckFailedError(
            f"quality fell by {drop:.1f} points, more than --max-quality-drop {limit:g}; "
            f"the files are kept in {options.out}; remove less",
            result,
        )


def _silent(stage: str, done: int, total: int, note: str = "") -> None:
    return None
