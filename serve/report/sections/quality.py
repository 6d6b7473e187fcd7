"""What the models can do: dense, cut and slim per task, with intervals, and how sure the differences are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from slimvlm.compress.evaluation.quality import (
    METRICS,
    PRIMARY,
    Comparison,
    Quality,
    Row,
    compare,
    image_numbers,
    untold,
)
from slimvlm.compress.runs import QUALITY
from slimvlm.serve.report.charts import Estimate, task_dots
from slimvlm.serve.report.document import Chart, Finding, Section, Table, figure, percent, points, share, shown, whole
from slimvlm.serve.report.files import RunFiles

TITLE = "Quality"
LEVEL, NORMAL_QUANTILE = 0.95, 1.959964  # of the intervals; the standard normal's (1 + LEVEL) / 2 quantile
CHARTED = 24  # tasks; the table has all


def quality_section(files: RunFiles) -> Section:
    """Accuracy per task and over all of them."""
    measured = files.quality
    if measured is None:
        text = "The quality was not measured: nothing is known of what the cut cost."
        return Section("quality", TITLE, (text,), findings=(Finding(text, "run.json: stages.evaluate", bad=True),))
    models, comparison = measured.models, measured.comparison
    by_task = {name: {task: one.of_task(task) for task in one.tasks} for name, one in models.items()}
    nothing = untold(models["dense"], measured.blind, models["slim"], comparison.seed)
    changes = _changes(by_task["dense"], by_task["slim"], comparison)
    estimates = {task: {name: _estimate(found[task]) for name, found in by_task.items()} for task in changes}
    return Section(
        "quality",
        TITLE,
        notes=_notes(files, comparison),
        findings=(
            *_overall_findings(comparison),
            *_recovery_findings(models, comparison),
            *_task_findings({task: change for task, change in changes.items() if task not in nothing}),
            *_blind_findings(measured.blind, nothing),
            *_sample_findings(files),
        ),
        parts=(
            _chart(estimates, comparison),
            _task_table(models, estimates, measured.blind),
            _change_table(comparison, changes, nothing),
            _score_table(models),
            *_vendor_tables(models, comparison.metric),
        ),
    )


def right(row: Row, kind: str) -> float:
    """The figure to quote of one question, 0 to 1."""
    return METRICS[kind][PRIMARY[kind]](row)


def _notes(files: RunFiles, comparison: Comparison) -> tuple[str, ...]:
    kind = files.quality.models["dense"].kind if files.quality else "generation"
    return (
        f"{whole(comparison.questions)} questions, the same for every model; the figure is {METRIC_NAMES[kind]}.",
        "dense is the model that was given, slim the one that was made"
        + (", cut the same before its recovery" if files.quality and "cut" in files.quality.models else "")
        + f". A model's interval is Wilson's at {share(LEVEL)} for its questions of that task, widened where they "
        "share images; the interval of a change is a paired bootstrap over the "
        f"{whole(comparison.images)} images, each with all its questions ({whole(comparison.resamples)} resamples, "
        f"seed {comparison.seed}, {share(comparison.level)}). Of many intervals some miss 0 by chance.",
    )


METRIC_NAMES = {
    "generation": "the share of answers that equal a right answer (case, articles and punctuation aside)",
    "retrieval": "the share of images and texts whose first match is right, both directions",
}


def _changes(dense: dict[str, Quality], slim: dict[str, Quality], overall: Comparison) -> dict[str, Comparison]:
    """Slim minus dense per task, with the settings of the overall comparison; what lost most first."""
    found = {
        task: compare(
            dense[task],
            slim[task],
            overall.seed,
            metric=overall.metric,
            resamples=overall.resamples,
            level=overall.level,
        )
        for task in dense
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].difference, item[0])))


# ------------------------------------------------------------------ findings


def _overall_findings(comparison: Comparison) -> tuple[Finding, ...]:
    level, interval = share(comparison.level), _points_interval(comparison)
    source = f"{QUALITY}: comparison"
    if verdict(comparison) == "worse":
        text = (
            f"Quality fell by {100 * comparison.drop:.1f} points ({level} interval of the change: {interval}): from "
            f"{percent(comparison.dense)} to {percent(comparison.slim)}, mean of tasks."
        )
        return (Finding(text, source, bad=True),)
    relation = "rose" if verdict(comparison) == "better" else "did not change measurably"
    text = (
        f"Quality {relation}: {percent(comparison.dense)} before, {percent(comparison.slim)} after, mean of tasks "
        f"({level} interval of the change: {interval} points)."
    )
    return (Finding(text, source),)


def _recovery_findings(models: Mapping[str, Quality], comparison: Comparison) -> tuple[Finding, ...]:
    """What the recovery gave on the evaluated questions, which it has not seen."""
    if "cut" not in models:
        return ()
    gain = compare(models["cut"], models["slim"], comparison.seed, metric=comparison.metric)
    source = f"{QUALITY}: rows of cut and slim"
    text = (
        f"from {percent(gain.dense)} to {percent(gain.slim)} on the evaluated questions ({share(gain.level)} "
        f"interval of the change: {_points_interval(gain)} points)"
    )
    if verdict(gain) == "better":
        return (Finding(f"The recovery took the cut model {text}.", source),)
    if verdict(gain) == "worse":
        return (Finding(f"The recovery made the cut model worse: {text}.", source, bad=True),)
    return (Finding(f"The recovery did not help measurably: it took the cut model {text}.", source, bad=True),)


def _task_findings(changes: dict[str, Comparison]) -> tuple[Finding, ...]:
    if len(changes) < 2:
        return ()
    fell = [(change.difference, task) for task, change in changes.items() if verdict(change) == "worse"]
    unsure = [task for task, change in changes.items() if verdict(change) == "undecided" and change.difference < 0]
    source = f"{QUALITY}: rows, per task"
    if not fell:
        return (Finding(f"No single task of {len(changes)} fell by more than chance explains.", source),)
    text = ", ".join(f"{shown(task)} ({points(difference)})" for difference, task in fell)
    more = f"; {len(unsure)} more fell within what chance explains" if unsure else ""
    verb = "task" if len(fell) == 1 else "tasks"
    found = f"{len(fell)} {verb} of {len(changes)} got worse, in points: {text}{more}."
    return (Finding(found, source, bad=True),)


def _blind_findings(blind: Quality | None, nothing: Sequence[str]) -> tuple[Finding, ...]:
    if blind is None:
        return ()
    text = f"With the images shuffled the dense model gets {percent(blind.score)} right: so much needs no image."
    findings = [Finding(text, f"{QUALITY}: blind.scores")]
    if nothing:
        names = ", ".join(map(shown, nothing)) if len(blind.tasks) > 1 else "This evaluation"
        text = f"{names}: tells nothing of the cut, for the dense model is not measurably better with its own images."
        findings.append(Finding(text, f"{QUALITY}: rows of dense and blind, per task", bad=True))
    return tuple(findings)


def _sample_findings(files: RunFiles) -> tuple[Finding, ...]:
    found = []
    if files.stage("evaluate").get("held_out") is False:
        text = "The evaluated samples are those the model was calibrated on: its figures may flatter."
        found.append(Finding(text, "run.json: stages.evaluate.held_out", bad=True))
    for stage, use in (("plan", "calibrated"), ("recover", "trained")):
        if left_out := files.stage(stage).get("left_out_samples"):
            text = f"{whole(left_out)} samples were not {use} on: the evaluation shows their images."
            found.append(Finding(text, f"run.json: stages.{stage}.left_out_samples"))
    if bad := files.stage("plan").get("bad_samples"):
        text = f"{len(bad)} samples could not be read and were left out."
        found.append(Finding(text, "run.json: stages.plan.bad_samples", bad=True))
    return tuple(found)


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


def wilson(values: Sequence[float], count: float | None = None) -> Estimate:
    """Mean of values in 0..1 and Wilson's score interval (1927) at LEVEL; for values between 0 and 1 it is too wide.

    Args:
        count: how many independent values they are worth; default: all.
    """
    count, mean, z = count or len(values), math.fsum(values) / len(values), NORMAL_QUANTILE
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    arm = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return Estimate(mean, max(0.0, min(mean, centre - arm)), min(1.0, max(mean, centre + arm)))


def _estimate(quality: Quality) -> Estimate:
    values = [right(row, quality.kind) for row in quality.rows]
    return wilson(values, worth(values, image_numbers(quality.rows)))


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


def _vendor_tables(models: Mapping[str, Quality], metric: str) -> tuple[Table, ...]:
    vendors = models["dense"].vendors
    if len(vendors) < 2:
        return ()
    rows = [
        (
            *(vendor, whole(figures["questions"])),
            *(percent(quality.vendors[vendor][metric]) for quality in models.values()),
        )
        for vendor, figures in vendors.items()
    ]
    source = f"{QUALITY}: vendors of {', '.join(models)}"
    return (Table("Per source of the images", ("source", "questions", *models), rows, source),)


def outcomes(dense: Quality, slim: Quality) -> dict[tuple[bool, bool], list[int]]:
    """(dense right, slim right) -> places of the rows."""
    pairs = np.array([[right(row, quality.kind) >= 1 for row in quality.rows] for quality in (dense, slim)]).T
    return {
        (first, second): [int(place) for place in np.flatnonzero((pairs == (first, second)).all(1))]
        for first in (True, False)
        for second in (True, False)
    }
