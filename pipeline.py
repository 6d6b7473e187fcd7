"""The one job: plan, slice, recover, evaluate, export, profile, report, in order; resumable, nothing clever."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from slimvlm.compress import processes
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.data.splits import Measured, Trained, read_evaluation, read_measured, read_trained
from slimvlm.compress.errors import CheckFailedError, CheckpointError, OutputError, SampleError, UnsuitableOptionError
from slimvlm.compress.evaluation.evaluate import Comparison, Quality, compare
from slimvlm.compress.files.decoding import read, shown
from slimvlm.compress.files.folders import refuse_inside, require_free, require_room, reserved
from slimvlm.compress.files.locks import locked_folder
from slimvlm.compress.models.checkpoint import build_meta
from slimvlm.compress.models.computing import cast, load_to_compute, require_whole, stored_bytes
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import READ, STAGES, CompressOptions, DeliverOptions, EvaluateOptions, PlanOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.recovery.checks import check_models, learns_whole, recipe_of
from slimvlm.compress.run_record import RECORD, options_of, outputs_of, read_record
from slimvlm.compress.runs import AGAIN, MODEL, PLAN, RunFolder
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.stages.alike import require_alike
from slimvlm.compress.stages.evaluate import evaluate_model, evaluate_seeing_and_blind, evaluate_stage
from slimvlm.compress.stages.plan import check_plan, check_waiting, chosen_criterion, plan_stage, read_plan
from slimvlm.compress.stages.recover import recover_stage
from slimvlm.compress.stages.slice import BESIDE, save_cut, slice_stage
from slimvlm.export import ExportOptions, evaluate_export
from slimvlm.export.packages import require_packages
from slimvlm.export.push import Pushed, check_hub, push_folder
from slimvlm.export.stage import export_stage
from slimvlm.foreseeing import Foreseen, check_room
from slimvlm.foreseeing import foresee as foresee_run
from slimvlm.serve.fitting.record import Fit
from slimvlm.serve.fitting.stage import check_targets, delivered, fit_stage, fit_whole, measured_times
from slimvlm.serve.frontier.frontier import Frontier
from slimvlm.serve.frontier.stage import frontier_stage
from slimvlm.serve.options import split_backend
from slimvlm.serve.profile import Profile
from slimvlm.serve.stage import profile_stage
from slimvlm.serve.targets import is_torch, what_runs


@dataclass(frozen=True)
class Result:
    """What one run gave; everything is also in files of the run folder."""

    out: Path
    plan: Plan
    bad_samples: int
    left_out_samples: int = 0  # of the calibration: --eval-data shows their images
    dense: Quality | None = None
    slim: Quality | None = None
    cut: Quality | None = None  # before the recovery, where there was one
    blind: Quality | None = None  # dense, with images shuffled
    rounded: Quality | None = None  # slim, with weights rounded as the variant it was trained for has them
    recovery: dict[str, Any] | None = None  # what the recover stage recorded: JSON
    export: Mapping[str, Any] = field(default_factory=dict)  # what the export stage recorded: JSON
    profile: Profile | None = None
    fit: Fit | None = None  # what was found for the targets
    frontier: Frontier | None = None  # dense and slim in every exported precision
    comparison: Comparison | None = None
    pushed: Pushed | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def compress(options: CompressOptions, progress: Progress = silent) -> Result:
    """The whole job.

    Raises:
        SlimvlmError: refused, with the reason (exit code 3).
        CheckFailedError: the result was made, but a check on it failed; files are kept (exit code 4).
    """
    return _joined(options, progress, plan_only=False)


def make_plan(options: CompressOptions, progress: Progress = silent) -> Result:
    """The plan stage alone: `plan.json` and `scores.safetensors`; `compress --resume` goes on from there."""
    return _joined(options, progress, plan_only=True)


def foresee(options: CompressOptions, progress: Progress = silent) -> Foreseen:
    """What `compress` would do; refused is what it would refuse at once. Writes nothing.

    Raises:
        SlimvlmError: as `compress`.
    """
    options = _checked(options)
    run, data, training = _opened(options, plan_only=False)
    trained = training() if options.recover != "none" else None
    done = [name for name in STAGES if run is not None and run.finished(name)]
    return foresee_run(options, data, trained, done, progress)


def _joined(options: CompressOptions, progress: Progress, plan_only: bool) -> Result:
    with processes.joined():
        options = _checked(options)  # one of them may lack a package
        with locked_folder(options.out) if processes.rank() == 0 else nullcontext():
            return _compress(options, progress, plan_only)


def _checked(options: CompressOptions) -> CompressOptions:
    """The options spelled out. What would be refused in the end is refused before the minutes until then."""
    options = options.resolved()
    chosen_criterion(options)
    if options.recover != "none":
        recipe_of(options)
    check_targets(options, options.cost != "parameters")
    ExportOptions(variants=options.variants).checked()
    if options.export:
        require_packages(ExportOptions(formats=options.export).checked())
    if options.push_to_hub is not None:
        check_hub(options.push_to_hub)
    elif options.private:
        raise UnsuitableOptionError("--private is about the repository of --push-to-hub; give both, or none")
    refuse_inside(options.out, {name: getattr(options, name) for name in READ})
    return options


def apply_saved_plan(
    model: str, plan_file: Path, out: Path, ratio: float | None = None, progress: Progress = silent, **changes: Any
) -> Plan:
    """Cut `model` by the plan in `plan_file` and save the checkpoint in `out`: with the `data` of the plan what
    `compress --recover none` gives; without, the units are cut and nothing is refitted.

    Args:
        ratio: remove only so much, what the plan took first.
        changes: further options: data, eval_data, device, dtype, max_bad_samples, trust_remote_code.

    Returns:
        The plan that was carried out.

    Raises:
        CheckpointError: the plan is unreadable, was made for other weights, or its order is not beside it.
        UnsuitableOptionError: `ratio` is more than the plan's.
        SampleError: `data` is not what the plan was calibrated on.
    """
    require_free(out)
    plan = read_plan(plan_file, ratio)
    data = changes.pop("data", None)
    options = PlanOptions(model=model, data=data or out, seed=plan.seed, compensation="none", **changes)
    samples: Sequence[Sample] = ()
    if data is not None and plan.compensation is not None:
        how = asdict(plan.compensation)
        options = replace(options, compensation=how.pop("name"), **how)
        if options.compensation not in COMPENSATIONS:
            raise CheckpointError(
                f"{plan_file} wants the compensation {shown(options.compensation)}, and this version knows only "
                f"{', '.join(COMPENSATIONS)}; make the plan again, or leave --data out: then units are cut and no more"
            )
        measured = read_measured(options)
        samples = measured.calibration
        if measured.digest != plan.calibration_digest:
            raise SampleError(
                f"{plan_file} was calibrated on other samples than {data} gives "
                f"({plan.calibration_digest[:12]} is not {measured.digest[:12]}); give --data and --eval-data as they "
                "were given to plan, or leave --data out: then nothing is refitted"
            )
    require_room(out, plan.parameters_after * stored_bytes(build_meta(model, options.trust_remote_code)[0]))
    with reserved(out):
        loaded = load_to_compute(options, model, beside=BESIDE)
        if loaded.digest != plan.model_digest:
            raise CheckpointError(
                f"{plan_file} was made for other weights than {model} "
                f"({plan.model_digest[:12]} is not {loaded.digest[:12]}); make a plan for this checkpoint"
            )
        if samples:
            save_cut(out, loaded, options, plan, samples, progress)
        else:
            stored: Any = loaded.model.config.dtype  # a dtype once loaded
            apply_plan(cast(loaded.model, stored), plan)
            save_checkpoint(out, loaded.model, loaded.processor, plan, plan.layout)
        return plan


def recover_run(out: Path, changes: Mapping[str, Any], progress: Progress = silent) -> Result:
    """Recover the model of the finished run in `out` (again), with the recovery options in `changes`, and export and
    profile it as the run did, unless `changes` name other formats.

    Raises:
        OutputError: `out` holds no run.
        SlimvlmError, CheckFailedError: as `compress`.
    """
    record = read_record(out)
    outputs = {"profile": False, **outputs_of(record)}
    if changes.get("export") is not None and not outputs.get("target"):
        outputs = {"profile": outputs["profile"]}
    given = {name: value for name, value in changes.items() if name != "export" or value is not None}
    return compress(options_of(out, record, **{**outputs, **given}), progress)


class Evaluation(NamedTuple):
    """What `evaluate` gave; `blind`: of the model compared with, else of the model itself, with images shuffled."""

    quality: Quality
    against: Quality | None
    comparison: Comparison | None
    blind: Quality | None


def evaluate_named(options: EvaluateOptions, against: str | None = None, progress: Progress = silent) -> Evaluation:
    """Quality of `options.model` on `options.data`, and compared with `against` when one is given.

    Each is a checkpoint or graphs of an export: `FOLDER[:BACKEND[:VARIANT]]`, see serve/targets.py.

    Raises:
        UnsuitableOptionError: no such graphs; or a dual encoder and a model that answers: no score is of both.
    """
    samples = read_evaluation(options)
    if against is None:
        quality, blind = _qualities(options, options.model, samples, progress, blind=True)
        return Evaluation(quality, None, None, blind)
    quality, _ = _qualities(options, options.model, samples, progress, blind=False)
    other, blind = _qualities(options, against, samples, progress, blind=True)
    if other.forced != quality.forced:
        raise UnsuitableOptionError(
            f"answers of one of {options.model} and {against} are forced (--stream on), the other one's are not; "
            "leave --stream out, or give two checkpoints"
        )
    if other.kind != quality.kind:
        raise UnsuitableOptionError(f"{options.model} is scored by {quality.kind}, {against} by {other.kind}")
    return Evaluation(quality, other, compare(other, quality, options.seed), blind)


def _qualities(
    options: EvaluateOptions, name: str, samples: Sequence[Sample], progress: Progress, *, blind: bool
) -> tuple[Quality, Quality | None]:
    """Of what is called `name`: seeing, and with the images shuffled where that is asked for and there are several."""
    folder, backend = what_runs(name, trust_remote_code=options.trust_remote_code)
    if is_torch(backend):
        form = split_backend(backend)[1]
        if blind:
            return evaluate_seeing_and_blind(options, folder, samples, progress, form)
        return evaluate_model(options, folder, samples, progress, form), None
    asked = partial(evaluate_export, Path(folder).expanduser(), backend, samples, options, progress)
    several = len({sample.image_key for sample in samples}) > 1
    return asked(), asked(options.seed) if blind and several else None


def _opened(options: CompressOptions, plan_only: bool) -> tuple[RunFolder | None, Measured, Callable[[], Trained]]:
    """The folder, of the first process; the samples; and those to train on, once they are asked for. Whatever can be
    refused is refused here, and nothing is touched.
    """
    run = None
    if processes.rank() == 0:
        run = RunFolder(options.out, options.identity(), resume=options.resume, overwrite=options.overwrite)
    data = read_measured(options)
    training = cache(partial(read_trained, options, data))
    if run is not None and not run.finished("plan"):
        check_plan(options)
        check_waiting(options, data)
        if not plan_only:
            check_room(options)
        if options.recover != "none" and not plan_only:
            training()
            check_models(options, options.attention_unit)
    return run, data, training


def _compress(options: CompressOptions, progress: Progress, plan_only: bool) -> Result:
    """Whatever can be refused is refused first; then the folder is touched, by the first process."""
    out = options.out
    if not plan_only and not _goes_by_block(options):
        require_whole(options, options.model, "comparing a model before and after")
    run, data, training = _opened(options, plan_only)
    if processes.count() > 1:
        require_alike(options, data, training() if options.recover != "none" and not plan_only else None)
    with run.begun() if run is not None else nullcontext():
        processes.require_shared(out / RECORD)
        run = run or RunFolder(out, options.identity(), resume=True, writer=False)
        if plan_only or (fit := fit_whole(run, options, data, progress)) is None:  # else nothing is to be calibrated
            by_time = options.cost != "parameters" and not run.finished("plan")
            times = measured_times(options, progress) if by_time else None
            plan = plan_stage(run, options, data, progress, times)
            if plan_only:
                return Result(out, plan, len(data.bad), data.left_out)
            fit = fit_stage(run, options, data, progress)
        if fit is not None:
            plan, options = read(out / PLAN, Plan, OutputError, AGAIN), delivered(options, fit)
        result = Result(out, plan, len(data.bad), data.left_out, fit=fit)
        slice_stage(run, options, plan, data, progress)
        processes.wait_for_all()
        result = replace(result, recovery=recover_stage(run, options, plan, data, training, progress))
        if not run.writer:
            return result
        with processes.alone():
            return _delivered(run, options, result, data, progress)


def _goes_by_block(options: CompressOptions) -> bool:
    """Whether no stage that was asked for needs a whole model in memory."""
    learns = options.recover != "none" and learns_whole(options)
    delivers = options.export != () or options.profile or options.target
    return options.stream == "on" and not (learns or delivers)


def _delivered(run: RunFolder, options: CompressOptions, result: Result, data: Measured, progress: Progress) -> Result:
    """Evaluate, export, profile and report; by the first process."""
    evaluated = evaluate_stage(run, options, data, progress)
    result = replace(
        result,
        **evaluated._asdict(),
        comparison=compare(evaluated.dense, evaluated.slim, options.seed),
        export=export_stage(run, options, options.eval_data or options.data, progress),
        profile=(profile := profile_stage(run, options, progress)),
        frontier=frontier_stage(run, options, result.plan, profile, data.evaluation, progress),
        seconds={name: stage["seconds"] for name, stage in run.record["stages"].items()},
    )
    from slimvlm.serve.report import write_report  # matplotlib takes a second to import

    write_report(options.out)
    _check(options, result)
    if options.push_to_hub is not None:
        pushed = push_folder(run.path / MODEL, options.push_to_hub, progress, private=options.private)
        result = replace(result, pushed=pushed)
    return result


def _check(options: DeliverOptions, result: Result) -> None:
    """Fail for what is wrong with a result whose files are all there."""
    if "failed" in result.export:
        raise CheckFailedError(result.export["failed"], result)
    limit, compared = options.max_quality_drop, result.comparison
    if compared and limit is not None and not (drop := 100 * compared.drop) <= limit:  # a drop of NaN is one, too
        raise CheckFailedError(
            f"quality fell by {drop:.1f} points, more than --max-quality-drop {limit:g}; "
            f"the files are kept in {result.out}; remove less",
            result,
        )
