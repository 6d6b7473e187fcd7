"""The one job: plan, cut, save, evaluate, in order; every stage is resumable and nothing here is clever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slimvlm.compress import processes
from slimvlm.compress.budget import Budget
from slimvlm.compress.calibrate import CalibrationOptions
from slimvlm.compress.checkpoint import Loaded, load_model, save_checkpoint
from slimvlm.compress.collate import Batch, Collator
from slimvlm.compress.criteria import CRITERIA, Criterion
from slimvlm.compress.errors import CheckFailedError, CheckpointError, UnsuitableOptionError
from slimvlm.compress.evaluate import Comparison, Quality, compare, evaluate
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.rounds import Planned, Planning, plan_in_rounds
from slimvlm.compress.runs import RunFolder, write_text
from slimvlm.compress.samples import Sample, SampleSet, batches, load_samples
from slimvlm.compress.slicing import apply_plan, mask_plan

Progress = Callable[[str, int, int], None]  # stage, done, total

# Logits of the cut model against the dense model with the same units masked, relative to the largest logit.
SLICE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HELD_OUT = 512  # samples of --data kept for the comparison when no --eval-data is given
CHECKED_SAMPLES = 4


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


def compress(options: CompressOptions, progress: Progress | None = None) -> Result:
    """The whole job.

    Raises:
        SlimvlmError: refused, with the reason (exit code 3).
        CheckFailedError: the result was made, but a check on it failed; files are kept (exit code 4).
    """
    options = options.resolved()
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


def evaluate_checkpoint(
    options: CompressOptions, against: str | None = None, progress: Progress | None = None
) -> tuple[Quality, Comparison | None]:
    """Quality of `options.model` on `options.data`, and compared with the checkpoint `against` when one is given."""
    samples = _load(options, options.data, options.eval_samples).samples
    quality = _evaluate(options, options.model, samples, progress or _silent)
    if against is None:
        return quality, None
    return quality, compare(_evaluate(options, against, samples, progress or _silent), quality, options.seed)


def _compress(options: CompressOptions, progress: Progress) -> Result:
    run = _open_run(options)
    data = _read_samples(options)
    plan = _plan_stage(run, options, data, progress)
    if not run.writer or options.stages == ("plan",):
        return Result(options.out, plan, None, {}, len(data.bad))
    _slice_stage(run, options, plan, data)
    dense, slim = _evaluate_stage(run, options, data, progress)
    comparison = compare(dense, slim, options.seed)
    seconds = {name: stage["seconds"] for name, stage in run.record["stages"].items()}
    result = Result(options.out, plan, comparison, seconds, len(data.bad), dense, slim)
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


@dataclass(frozen=True)
class _Data:
    """Samples to calibrate on and samples to evaluate with, the digest of all that was read, and what was unusable."""

    calibration: Sequence[Sample]
    evaluation: Sequence[Sample]
    held_out: bool
    digest: str
    bad: tuple[Any, ...]


def _read_samples(options: CompressOptions) -> _Data:
    """Calibration samples from --data; evaluation samples from --eval-data, else the rest of --data."""
    wanted = options.eval_samples or HELD_OUT
    limit = options.samples if options.eval_data else options.samples + wanted
    read = _load(options, options.data, limit)
    if options.eval_data:
        held = _load(options, options.eval_data, options.eval_samples)
        return _Data(read.samples, held.samples, True, read.digest, (*read.bad, *held.bad))
    # Every k-th sample is held out, so that both parts cover the whole file; --samples is what calibration gets.
    count = max(0, min(wanted, len(read.samples) - options.samples))
    held_out = {round((index + 0.5) * len(read.samples) / count) for index in range(count)} if count else set()
    calibration = [sample for index, sample in enumerate(read.samples) if index not in held_out]
    evaluation = [sample for index, sample in enumerate(read.samples) if index in held_out]
    return _Data(calibration, evaluation or calibration, bool(evaluation), read.digest, read.bad)


def _load(options: CompressOptions, data: Path, limit: int | None) -> SampleSet:
    return load_samples(
        data, limit=limit, seed=options.seed, max_bad=options.max_bad_samples, split_prefix=options.prefix_split
    )


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


def _plan_stage(run: RunFolder, options: CompressOptions, data: _Data, progress: Progress) -> Plan:
    path = options.out / "plan.json"
    if run.finished("plan"):
        return Plan.from_json(path.read_text())
    partial = options.out / "plan.partial.json"
    with run.stage("plan") as facts:
        loaded = _load_model(options, options.model)
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


def _load_model(options: CompressOptions, name: str) -> Loaded:
    """The model in the dtype to compute in, and the dtype it is stored in as `config.dtype`."""
    loaded = load_model(name, trust_remote_code=options.trust_remote_code, device=processes.pick_device(options.device))
    _cast(loaded.model, _compute_dtype(options.dtype, loaded.model))
    return loaded


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Cast the weights in place, but no buffer: rotary frequencies must stay in the fp32 transformers made them in."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _compute_dtype(asked: str, model: torch.nn.Module) -> torch.dtype:
    """`auto` computes in the stored dtype, but in fp32 where fp16 is slow and its gradients overflow: on a CPU."""
    if asked != "auto":
        return DTYPES[asked]
    return torch.float32 if model.device.type == "cpu" and model.dtype == torch.float16 else model.dtype


# ------------------------------------------------------------------ slice, save


def _slice_stage(run: RunFolder, options: CompressOptions, plan: Plan, data: _Data) -> None:
    if run.finished("slice"):
        return
    with run.stage("slice") as facts:
        shutil.rmtree(options.out / "model", ignore_errors=True)  # of a process that died before it could say finished
        loaded = _load_model(options, options.model)
        model = loaded.model
        stored, computed = model.config.dtype, model.dtype
        batch = Collator(loaded.processor, loaded.family, model.config).training(data.calibration[:CHECKED_SAMPLES])
        masked = _logits(mask_plan(model, plan), batch)
        facts["masked_difference"] = _relative_difference(masked, _logits(apply_plan(model, plan), batch))
        save_checkpoint(options.out / "model", _cast(model, stored), loaded.processor, plan, options.layout)
        sliced = _logits(_cast(model, computed), batch)
        reloaded = _load_model(options, str(options.out / "model"))
        facts["reload_difference"] = _relative_difference(sliced, _logits(reloaded.model, batch))
        _require_equal(facts, computed, options.out)


def _logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's outputs on `batch`: token logits, or the similarities of a dual encoder."""
    with torch.inference_mode():
        output = model(**{name: value.to(model.device) for name, value in batch.items() if name != "return_loss"})
    return output.logits_per_image if hasattr(output, "logits_per_image") else output.logits


def _relative_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((expected - found).abs().max() / expected.abs().max().clamp(min=1)).item()


def _require_equal(facts: dict[str, Any], dtype: torch.dtype, out: Path) -> None:
    if facts["masked_difference"] > SLICE_TOLERANCE[dtype]:
        raise CheckFailedError(
            f"{out / 'model'}: the cut model differs from the masked dense model by {facts['masked_difference']:.2e} "
            f"(relative; accepted {SLICE_TOLERANCE[dtype]:.0e}); please report this model"
        )
    if facts["reload_difference"] > 0:
        raise CheckFailedError(
            f"{out / 'model'}: the reloaded checkpoint differs from what was saved by "
            f"{facts['reload_difference']:.2e}; please report this model"
        )


# ------------------------------------------------------------------ evaluate


def _evaluate_stage(
    run: RunFolder, options: CompressOptions, data: _Data, progress: Progress
) -> tuple[Quality, Quality]:
    """Quality of the dense and of the slim model on the same questions."""
    path = options.out / "quality.json"
    if run.finished("evaluate"):
        document = json.loads(path.read_text())
        return Quality.from_dict(document["dense"]), Quality.from_dict(document["slim"])
    with run.stage("evaluate") as facts:
        facts.update(samples=len(data.evaluation), held_out=data.held_out)
        dense = _evaluate(options, options.model, data.evaluation, progress)
        slim = _evaluate(options, str(options.out / "model"), data.evaluation, progress)
        comparison = compare(dense, slim, options.seed).to_dict()
        document = {"dense": dense.to_dict(), "slim": slim.to_dict(), "comparison": comparison}
        write_text(path, json.dumps(document, indent=1, sort_keys=True) + "\n")
    return dense, slim


def _evaluate(options: CompressOptions, name: str, samples: Sequence[Sample], progress: Progress) -> Quality:
    loaded = _load_model(options, name)
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


def _silent(stage: str, done: int, total: int) -> None:
    return None
