"""What the models can do: dense, cut and slim per task, with intervals, and how sure the differences are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np

from slimvlm.compress.evaluation.quality import (
    COUNTED,
    FORCED,
    LEVEL,
    METRICS,
    PRIMARY,
    Comparison,
    Quality,
    Row,
    compare,
    image_numbers,
    untold,
    wilson,
)
from slimvlm.compress.runs import QUALITY
from slimvlm.serve.report.charts import Estimate, task_dots
from slimvlm.serve.report.document import Chart, Finding, Said, Table, figure, percent, points, share, shown, whole
from slimvlm.serve.report.files import RunFiles

CHARTED = 24  # tasks; the table has all


def quality_section(files: RunFiles) -> Iterator[Said]:
    """Accuracy per task and over all of them."""
    measured = files.quality
    if measured is None:
        text = "The quality was not measured: nothing is known of what the cut cost."
        yield from (text, Finding(text, "run.json: stages.evaluate", bad=True))
        return
    models, blind, comparison = measured.models, measured.blind, measured.comparison
    by_task = {name: {task: one.of_task(task) for task in one.tasks} for name, one in models.items()}
    nothing = untold(models["dense"], blind, models["slim"], comparison.seed)
    changes = _changes(by_task["dense"], by_task["slim"], comparison)
    estimates = {task: {name: _estimate(found[task]) for name, found in by_task.items()} for task in changes}
    yield from _notes(models, comparison)
    yield _overall_finding(comparison)
    yield from _recovery_findings(models, comparison)
    yield from _rounded_findings(files, measured.rounded, comparison)
    yield from _task_findings({task: change for task, change in changes.items() if task not in nothing})
    yield from _blind_findings(blind, nothing)
    yield from _sample_findings(files)
    yield _chart(estimates, comparison)
    yield _task_table(models, estimates, blind)
    yield _change_table(comparison, changes, nothing)
    yield _score_table(models)
    yield from _vendor_tables(models, comparison.metric)


def right(row: Row, kind: str) -> float:
    """The figure to quote of one question, 0 to 1."""
    return METRICS[kind][PRIMARY[kind]](row)


def _notes(models: Mapping[str, Quality], comparison: Comparison) -> Iterator[str]:
    yield (
        f"{whole(comparison.questions)} questions, the same for every model; the figure is "
        f"{COUNTED[models['dense'].kind]}{'; ' + FORCED if models['dense'].forced else ''}."
    )
    yield (
        "dense is the model that was given, slim the one that was made"
        + (", cut the same before its recovery" if "cut" in models else "")
        + f". A model's interval is Wilson's at {share(LEVEL)} for its questions of that task, widened where they "
        "share images; the interval of a change is a paired bootstrap over the "
        f"{whole(comparison.images)} images, each with all its questions ({whole(comparison.resamples)} resamples, "
        f"seed {comparison.seed}, {share(comparison.level)}). Of many intervals some miss 0 by chance."
    )


def _changes(dense: dict[str, Quality], slim: dict[str, Quality], overall: Comparison) -> dict[str, Comparison]:
    """Slim minus dense per task, with the settings of the overall comparison; what lost most first."""
    alike = partial(compare, seed=overall.seed, metric=overall.metric, resamples=overall.resamples, level=overall.level)
    found = {task: alike(dense[task], slim[task]) for task in dense}
    return dict(sorted(found.items(), key=lambda item: (item[1].difference, item[0])))


# ------------------------------------------------------------------ findings


def _overall_finding(comparison: Comparison) -> Finding:
    level, interval = share(comparison.level), _points_interval(comparison)
    if verdict(comparison) == "worse":
        text = (
            f"Quality fell by {100 * comparison.drop:.1f} points ({level} interval of the change: {interval}): from "
            f"{percent(comparison.dense)} to {percent(comparison.slim)}, mean of tasks."
        )
        return Finding(text, f"{QUALITY}: comparison", bad=True)
    relation = "rose" if verdict(comparison) == "better" else "did not change measurably"
    text = (
        f"Quality {relation}: {percent(comparison.dense)} before, {percent(comparison.slim)} after, mean of tasks "
        f"({level} interval of the change: {interval} points)."
    )
    return Finding(text, f"{QUALITY}: comparison")


def _recovery_findings(models: Mapping[str, Quality], comparison: Comparison) -> Iterator[Finding]:
    """What the recovery gave on the evaluated questions, which it has not seen."""
    if "cut" not in models:
        return
    gain = compare(models["cut"], models["slim"], comparison.seed, metric=comparison.metric)
    did = {"better": "The recovery took the cut model", "worse": "The recovery made the cut model worse:"}.get(
        verdict(gain), "The recovery did not help measurably: it took the cut model"
    )
    text = (
        f"{did} from {percent(gain.dense)} to {percent(gain.slim)} on the evaluated questions ({share(gain.level)} "
        f"interval of the change: {_points_interval(gain)} points)."
    )
    yield Finding(text, f"{QUALITY}: rows of cut and slim", bad=verdict(gain) != "better")


def _rounded_findings(files: RunFiles, rounded: Quality | None, comparison: Comparison) -> Iterator[Finding]:
    if rounded is None:
        return
    variant = shown(files.stage("recover")["options"]["recover_as"])
    text = (
        f"The recovery was for {variant}: with the weights of {variant} slim gets {percent(rounded.score)} right. What "
        f"else is said of slim here, {percent(comparison.slim)} first, is with its whole weights."
    )
    yield Finding(text, f"{QUALITY}: rounded.scores; run.json: stages.recover.options.recover_as")


def _task_findings(changes: dict[str, Comparison]) -> Iterator[Finding]:
    if len(changes) < 2:
        return
    fell = [(change.difference, task) for task, change in changes.items() if verdict(change) == "worse"]
    unsure = [task for task, change in changes.items() if verdict(change) == "undecided" and change.difference < 0]
    text = f"No single task of {len(changes)} fell by more than chance explains."
    if fell:
        named = ", ".join(f"{shown(task)} ({points(difference)})" for difference, task in fell)
        more = f"; {len(unsure)} more fell within what chance explains" if unsure else ""
        tasks = "task" if len(fell) == 1 else "tasks"
        text = f"{len(fell)} {tasks} of {len(changes)} got worse, in points: {named}{more}."
    yield Finding(text, f"{QUALITY}: rows, per task", bad=bool(fell))


def _blind_findings(blind: Quality | None, nothing: Sequence[str]) -> Iterator[Finding]:
    if blind is None:
        return
    text = f"With the images shuffled the dense model gets {percent(blind.score)} right: so much needs no image."
    yield Finding(text, f"{QUALITY}: blind.scores")
    if nothing:
        names = ", ".join(map(shown, nothing)) if len(blind.tasks) > 1 else "This evaluation"
        text = f"{names}: tells nothing of the cut, for the dense model is not measurably better with its own images."
        yield Finding(text, f"{QUALITY}: rows of dense and blind, per task", bad=True)


def _sample_findings(files: RunFiles) -> Iterator[Finding]:
    if files.stage("evaluate").get("held_out") is False:
        text = "The evaluated samples are those the model was calibrated on: its figures may flatter."
        yield Finding(text, "run.json: stages.evaluate.held_out", bad=True)
    for stage, use in (("plan", "calibrated"), ("recover", "trained")):
        if left_out := files.stage(stage).get("left_out_samples"):
            text = f"{whole(left_out)} samples were not {use} on: the evaluation shows their images."
            yield Finding(text, f"run.json: stages.{stage}.left_out_samples")
    if bad := files.stage("plan").get("bad_samples"):
        text = f"{len(bad)} samples could not be read and were left out."
        yield Finding(text, "run.json: stages.plan.bad_samples", bad=True)


def verdict(change: Comparison) -> str:
    """`worse` or `better` where the interval of the change leaves 0 out, else `undecided`; `equal` if nothing moved."""
    if change.low == change.high == 0:
        return "equal"
    if change.low > 0:
        return "better"
    return "worse" if change.high < 0 else "undecided"


def _points_interval(change: Comparison) -> str:
    return f"{points(change.low)} to {points(change.high)}"


# ------------------------------------------------------------------ charts and tables


def _estimate(quality: Quality) -> Estimate:
    values = [right(row, quality.kind) for row in quality.rows]
    mean = math.fsum(values) / len(values)
    return Estimate(mean, *wilson(mean, worth(values, image_numbers(quality.rows))))


def worth(values: Sequence[float], images: np.ndarray) -> float:
    """How many independent values these are worth, of which some share an image: their number over the design effect
    (Kish, 1965: variance of the mean with images drawn over that with values drawn). As many as images where all are
    the same, for then nothing tells.
    """
    centred = np.array(values) - np.mean(values)
    sums = np.bincount(images, centred)
    if len(sums) < 2 or not centred.any():
        return float(len(sums))
    effect = float((sums**2).sum() / (centred**2).sum()) * len(sums) / (len(sums) - 1)
    return len(values) / max(1.0, effect * (len(values) - 1) / len(values))


def _chart(estimates: dict[str, dict[str, Estimate]], comparison: Comparison) -> Chart:
    some = f", the {CHARTED} that lost most" if len(estimates) > CHARTED else ""
    tasks = dict(list(estimates.items())[:CHARTED])
    return task_dots("tasks", f"Every task{some}: {_metric(comparison.metric)}", tasks, f"{comparison.metric}, %")


def _metric(name: str) -> str:
    return {"exact": "share of right answers", "mean_r1": "share of first matches that are right"}.get(name, name)


def _task_table(
    models: Mapping[str, Quality], estimates: dict[str, dict[str, Estimate]], blind: Quality | None
) -> Table:
    metric = PRIMARY[models["dense"].kind]
    rows = []
    for task, found in estimates.items():
        cells = (f"{100 * one.value:.1f} ({100 * one.low:.1f} to {100 * one.high:.1f})" for one in found.values())
        unseen = () if blind is None else (f"{100 * blind.tasks[task][metric]:.1f}",)
        rows.append((task, whole(models["dense"].tasks[task]["questions"]), *cells, *unseen))
    return Table(
        "Per task, with intervals, in percent",
        ("task", "questions", *models, *(() if blind is None else ("dense, images shuffled",))),
        rows,
        f"{QUALITY}: tasks of {', '.join(models)}{'' if blind is None else ' and blind'}; intervals from their rows",
    )


def _change_table(comparison: Comparison, changes: dict[str, Comparison], nothing: Sequence[str]) -> Table:
    named = [("mean of tasks", comparison), *changes.items()]
    rows = [
        (
            *(name, points(change.difference), _points_interval(change)),
            "tells nothing" if name in nothing else verdict(change),
        )
        for name, change in named
    ]
    return Table(
        "Slim minus dense, in points",
        ("task", "change", "interval", "verdict"),
        rows,
        f"{QUALITY}: comparison (first row); comparison.tasks, with intervals from the rows",
    )


def _score_table(models: Mapping[str, Quality]) -> Table:
    names = list(models["dense"].scores)
    rows = [(name.replace("_", " "), *(figure(quality.scores[name]) for quality in models.values())) for name in names]
    source = f"{QUALITY}: scores of {', '.join(models)}"
    return Table("All figures, mean of tasks", ("", *models), rows, source)


def _vendor_tables(models: Mapping[str, Quality], metric: str) -> Iterator[Table]:
    vendors = models["dense"].vendors
    rows = [
        (vendor, whole(figures["questions"]), *(percent(one.vendors[vendor][metric]) for one in models.values()))
        for vendor, figures in vendors.items()
    ]
    if len(vendors) > 1:
        columns, source = ("source", "questions", *models), f"{QUALITY}: vendors of {', '.join(models)}"
        yield Table("Per source of the images", columns, rows, source)


def outcomes(dense: Quality, slim: Quality) -> dict[tuple[bool, bool], list[int]]:
    """(dense right, slim right) -> places of the rows."""
    pairs = list(zip(*([right(row, one.kind) >= 1 for row in one.rows] for one in (dense, slim)), strict=True))
    cases = product((True, False), repeat=2)
    return {(first, second): [n for n, pair in enumerate(pairs) if pair == (first, second)] for first, second in cases}
