"""Results on stdout: tables for people, one JSON document for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimvlm.console.printing import print_json, print_line, print_table, print_warning

if TYPE_CHECKING:
    from slimvlm.compress.evaluation.quality import Comparison, Quality
    from slimvlm.compress.models.saving import Quantized
    from slimvlm.compress.plan import Plan
    from slimvlm.compress.sparsity.sparsify import Sparsified
    from slimvlm.export.checks.verification import Verification
    from slimvlm.export.job import ExportResult
    from slimvlm.export.push import Pushed
    from slimvlm.kernels.bench import Report as KernelReport
    from slimvlm.pipeline import Evaluation, Result
    from slimvlm.serve.profile import Cell

SHOWN_PHASES = ("vision", "text", "ttft", "tpot")
NO_FRACTIONS = ("token_loss", "perplexity")  # metrics that are not a share of the questions


def count(number: int) -> str:
    """A count for people: 950, 2.51 k, 2.51 M, 7.62 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def percent(fraction: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * fraction:.1f} %"


def show_compression(result: Result, *, as_json: bool) -> None:
    """What `compress` gave: sizes and quality before and after, seconds per stage, and where the files are."""
    plan, comparison = result.plan, result.comparison
    untold = _untold(result.dense, result.blind, result.slim, comparison.seed if comparison else 0)
    _warn_of_plan(plan)
    if as_json:
        quality = comparison.to_dict() if comparison else None
        print_json(
            {
                **_plan_document(plan),
                "out": str(result.out),
                "quality": quality,
                "quality_before_recovery": result.cut.score if result.cut else None,
                "quality_rounded": result.rounded.score if result.rounded else None,
                "blind": result.blind.score if result.blind else None,
                "tasks_that_tell_nothing": list(untold),
                "recovery": result.recovery,
                "fit": asdict(result.fit) if result.fit else None,
                "export": result.export,
                "choices": _choices(result),
                "speed": [
                    {
                        "backend": cell.backend,
                        "workload": cell.workload,
                        **{k: asdict(v) for k, v in cell.ratios.items()},
                    }
                    for cell in (result.profile.cells if result.profile else ())
                ],
                "bad_samples": result.bad_samples,
                "left_out_samples": result.left_out_samples,
                "pushed": asdict(result.pushed) if result.pushed else None,
                "seconds": result.seconds,
            }
        )
        return
    rows = _size_rows(plan)
    if comparison:
        rows.append(_quality_row(comparison))
    if comparison and result.dense and result.slim:
        rows.extend(_task_rows(result.dense, result.slim, comparison.metric, untold))
    print_table(("", "before", "after", "change"), rows)
    _print_removed(plan)
    for sentence in result.fit.sentences if result.fit else ():
        print_line(f"targets  {sentence}")
    if result.blind and comparison:
        _print_blind(result.blind, untold)
    for line in _recovery_lines(result):
        print_line(line)
    if result.bad_samples:
        print_line(f"skipped  {result.bad_samples} unreadable samples, named in {result.out / 'run.json'}")
    print_left_out(result)
    print_line("seconds  " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items()))
    _print_made(result)


def _print_made(result: Result) -> None:
    """Where everything is, and what was measured of it."""
    print_line(f"model    {result.out / 'model'}")
    if result.export.get("formats"):
        print_line(f"export   {_exported(result)}")
    for cell in _compared(result):
        print_line(f"speed    {cell.backend}, {cell.workload}: {_speed(cell)}")
    for sentence in _choices(result):
        print_line(f"choose   {sentence}")
    if result.pushed:
        show_pushed(result.pushed, as_json=False)
    print_line(f"report   {result.out / 'report.html'}, report.md; every figure in the .json files beside it")


def print_left_out(result: Result) -> None:
    """A line about calibration samples whose images are evaluated on, if there were any."""
    if result.left_out_samples:
        print_line(f"left out {result.left_out_samples} calibration samples: --eval-data shows their images")


def _exported(result: Result) -> str:
    if reason := result.export.get("refused"):
        return f"none: {reason}"
    equal = [
        f"{check['format']} {check['variant']} {check['equal']} of {check['samples']}"
        for check in result.export.get("checks", ())
    ]
    return f"{result.out / 'export'}; greedy answers equal to torch's: {', '.join(equal) or 'see manifest.json'}"


def _choices(result: Result) -> list[str]:
    """Whether to cut, to quantise, or both, in sentences."""
    from slimvlm.serve.frontier.choosing import recommend  # numpy takes a moment to import

    return [choice.sentence for choice in recommend(result.frontier)] if result.frontier else []


def _compared(result: Result) -> list[Cell]:
    return [cell for cell in result.profile.cells if cell.ratios] if result.profile else []


def _speed(cell: Cell) -> str:
    shown = [(phase, cell.ratios[phase]) for phase in SHOWN_PHASES if phase in cell.ratios]
    return ", ".join(f"{phase} {ratio.value:.2f} x ({ratio.verdict})" for phase, ratio in shown)


def _recovery_lines(result: Result) -> Iterator[str]:
    """What the recovery gave, and what the model scores as the variant it was trained for."""
    recovery = result.recovery
    if recovery is None or result.cut is None:
        return
    trained = f"{recovery['steps']} steps of {recovery['options']['recover']}, {recovery['seconds']:.0f} s"
    if recovery["helped"]:
        yield f"recovery {percent(result.cut.score)} before it; {trained}, state of step {recovery['best_step']} kept"
    else:
        yield f"recovery did not help on the validation samples ({trained}): the cut model is kept as it was"
    if result.rounded is not None:
        variant = recovery["options"]["recover_as"]
        yield f"as {variant}    {percent(result.rounded.score)} with the weights of {variant}, for which it was trained"


def show_plan(plan: Plan, written: Path, *, as_json: bool) -> None:
    """Sizes before and after a plan, and what was `written`."""
    _warn_of_plan(plan)
    if as_json:
        print_json({**_plan_document(plan), "out": str(written)})
        return
    print_table(("", "before", "after", "change"), _size_rows(plan))
    _print_removed(plan)
    print_line(f"written  {written}")


def show_sparsified(done: Sparsified, written: Path, *, as_json: bool) -> None:
    """How much of every group became zero, of all, and what that is good for."""
    if as_json:
        print_json({**asdict(done), "out": str(written)})
        return
    print_table(("group", "zeros"), [(key, percent(share)) for key, share in done.groups.items()])
    print_line()
    print_line(f"zeros    {100 * done.zeros:.2f} % of all parameters ({done.pattern}, {done.rule}, {done.allocator})")
    print_line("times    those of the dense model: zeros are stored and multiplied as any other number")
    print_line(f"written  {written}")


def show_quality(evaluation: Evaluation, seed: int, *, as_json: bool) -> None:
    """Scores per task, their mean, the difference to another model where one was given, and what needs no image."""
    from slimvlm.compress.evaluation.quality import FORCED

    quality, against, comparison, blind = evaluation
    untold = _untold(against or quality, blind, quality if against else None, seed)
    if as_json:
        documents = {"quality": quality, "comparison": comparison, "blind": blind}
        found = {name: None if one is None else one.to_dict() for name, one in documents.items()}
        print_json({**found, "tasks_that_tell_nothing": list(untold)})
        return
    names = list(quality.scores)
    rows = [(task, str(scores["questions"]), *_cells(names, scores)) for task, scores in quality.tasks.items()]
    rows.append(("mean of tasks", str(len(quality.rows)), *_cells(names, quality.scores)))
    print_table(("task", "questions", *(name.replace("_", " ") for name in names)), rows)
    if quality.forced:
        print_line(FORCED)
    if comparison:
        print_line()
        print_table(("", "against", "this", "change"), [_quality_row(comparison)])
    if blind:
        print_line()
        _print_blind(blind, untold)


def show_export(result: ExportResult, *, as_json: bool) -> None:
    """The files of an export, how far each is from torch, and the generations that were compared."""
    manifest = result.manifest
    if as_json:
        print_json({"out": str(result.out), "seconds": result.seconds, "manifest": asdict(manifest)})
        return
    rows = []
    for one in manifest.artifacts:
        worst = max((case["max_relative"] for case in one.parity), default=float("nan"))
        rows.append((one.file, one.exporter, f"{worst:.1e}", "yes" if one.ok else "NO"))
    print_table(("file", "exporter", "relative difference", "accepted"), rows)
    print_line()
    for check in manifest.checks:
        equal = (
            f"{check['equal']} of {check['samples']} answers are torch's, {percent(check['token_share'])} of the tokens"
        )
        print_line(f"{check['format']} {check['variant']}: {equal}")
    if any(check["forced"] for check in manifest.checks):
        from slimvlm.compress.evaluation.quality import FORCED

        print_line(FORCED)
    print_line(f"written  {result.out}, {len(manifest.files)} files named in manifest.json, {result.seconds:.0f} s")


def show_quantized(made: Quantized, *, as_json: bool) -> None:
    """Sizes, and what became of the linears."""
    if as_json:
        print_json({**asdict(made), "out": str(made.out)})
        return
    print_line(f"{made.out}  {made.bytes / 1e6:.2f} MB, {made.bytes_before / 1e6:.2f} MB before")
    print_line(", ".join(f"{number} linears in {form}" for form, number in sorted(made.linears.items())))
    if made.linears.get("int8") and made.form != "int8":
        print_line("8 bits where a row is no multiple of 32 weights; --round-channels 32 makes plans whose rows are")


def show_verification(verification: Verification, *, as_json: bool) -> None:
    """What was checked of an exported folder."""
    if as_json:
        print_json(verification.to_dict())
        return
    print_line(f"{verification.folder}: {verification.files} files are what manifest.json says")
    for check in verification.checks:
        print_line("  " + ", ".join(f"{name} {value}" for name, value in check.items()))
    for skipped in verification.skipped:
        print_line(f"  not run: {skipped}")


def show_kernels(report: KernelReport, text: str, *, as_json: bool) -> None:
    """Checks and timings of the kernels."""
    if as_json:
        print_json(report.to_dict())
    else:
        print_line(text)


def show_written(path: Path, *, as_json: bool) -> None:
    """A file that was written."""
    if as_json:
        print_json({"written": str(path)})
    else:
        print_line(f"written  {path}")


def show_pushed(pushed: Pushed, *, as_json: bool) -> None:
    """Where a folder is on the Hub."""
    if as_json:
        print_json(asdict(pushed))
    else:
        print_line(f"pushed   {pushed.url} ({pushed.files} files)")


def _warn_of_plan(plan: Plan) -> None:
    """What an allocator without floors did to a model it was not made for; plans of the others pass."""
    if plan.overshoots and plan.blocks:
        print_warning(
            f"{percent(plan.removed_fraction)} of all parameters go where {percent(plan.ratio)} was asked for: blocks "
            "leave whole"
        )
    elif plan.overshoots:
        print_warning(
            f"{percent(plan.removed_fraction)} of all parameters go where {percent(plan.ratio)} was asked for: the "
            "paper's loop takes whole steps of 1000 units, then 100, which is much in this model; --criterion ukmi "
            "--allocator balanced --rounds 1 --no-refit without --faithful takes the same scores in small steps"
        )
    if plan.rescued:
        print_warning(
            f"the paper's loop empties {len(plan.rescued)} groups, which keep one unit each: {', '.join(plan.rescued)}"
        )


def _plan_document(plan: Plan) -> dict[str, Any]:
    return {
        "dropped": {"blocks": dict(plan.dropped), "parameters": plan.dropped_parameters},
        "rescued": list(plan.rescued),
        "parameters": {"before": plan.parameters_before, "after": plan.parameters_after},
        "removed_of_all": plan.removed_fraction,
        "removed_of_prunable": _removed_of_prunable(plan),
        "towers": {name: asdict(tower) for name, tower in plan.towers.items()},
    }


def _size_rows(plan: Plan) -> list[tuple[str, ...]]:
    rows = [_size_row("parameters", plan.parameters_before, plan.parameters_after)]
    towers = sorted(plan.towers.items())
    for name, tower in towers:
        rows.append(_size_row(f"  {name}", tower.parameters_before, tower.parameters_after))
    for name, tower in towers:
        rows.append(_size_row(f"multiply-adds per token, {name}", tower.macs_before, tower.macs_after))
    return rows


def _size_row(name: str, before: int, after: int) -> tuple[str, ...]:
    return name, count(before), count(after), f"{100 * (after / before - 1):+.1f} %" if before else ""


def _quality_row(comparison: Comparison) -> tuple[str, ...]:
    """A metric that is a fraction is printed in percent and points, a loss as it is; with the interval."""
    name = f"{comparison.metric.replace('_', ' ')}, mean of tasks"
    figures = (comparison.dense, comparison.slim)
    change = (comparison.difference, comparison.low, comparison.high)
    if comparison.metric in NO_FRACTIONS:
        return name, *(f"{figure:.3f}" for figure in figures), "{:+.3f} ({:+.3f} to {:+.3f})".format(*change)
    points = (100 * value for value in change)
    return name, *(percent(figure) for figure in figures), "{:+.1f} points ({:+.1f} to {:+.1f})".format(*points)


def _untold(dense: Quality | None, blind: Quality | None, slim: Quality | None, seed: int) -> Sequence[str]:
    from slimvlm.compress.evaluation.quality import untold

    return untold(dense, blind, slim, seed) if dense else ()


def _print_blind(blind: Quality, untold: Sequence[str]) -> None:
    print_line(f"blind    {percent(blind.score)}: what the dense model gets right with the images shuffled")
    if untold:
        tasks = ", ".join(untold) if len(blind.tasks) > 1 else "the evaluation"
        print_line(f"         {tasks}: tells nothing, for there it is not measurably better with its own images")


def _task_rows(dense: Quality, slim: Quality, metric: str, untold: Sequence[str]) -> list[tuple[str, ...]]:
    """The compared metric per task, where samples name one, then the other figures, both models side by side."""
    rows: list[tuple[str, ...]] = []
    tasks = sorted(dense.tasks) if len(dense.tasks) > 1 else []
    for name, before, after in [(f"  {task}", dense.tasks[task][metric], slim.tasks[task][metric]) for task in tasks]:
        change = "tells nothing" if name.strip() in untold else f"{100 * (after - before):+.1f} points"
        rows.append((name, percent(before), percent(after), change))
    for name in (name for name in NO_FRACTIONS if name in dense.scores):
        before, after = dense.scores[name], slim.scores[name]
        rows.append((name.replace("_", " "), f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"))
    return rows


def _cells(names: Sequence[str], scores: Mapping[str, float]) -> list[str]:
    return [f"{scores[name]:.3f}" if name in NO_FRACTIONS else percent(scores[name]) for name in names]


def _print_removed(plan: Plan) -> None:
    print_line()
    of_all, of_prunable = percent(plan.removed_fraction), percent(_removed_of_prunable(plan))
    print_line(f"removed  {of_all} of all parameters, {of_prunable} of the prunable weights")
    if plan.dropped:
        blocks = ", ".join(f"the last {blocks} in {tower}" for tower, blocks in plan.dropped.items())
        print_line(f"         {count(plan.dropped_parameters)} of them for free: blocks that nobody reads, {blocks}")
    for tower, gone in plan.gone.items():
        print_line(f"         {len(gone)} of {len(gone) + len(plan.blocks[tower])} blocks of {tower} leave whole")


def _removed_of_prunable(plan: Plan) -> float:
    """Removed fraction of the weights that can be cut (the towers' multiply-adds per token are these weights)."""
    before = sum(tower.macs_before for tower in plan.towers.values())
    return 1 - sum(tower.macs_after for tower in plan.towers.values()) / before if before else 0.0
