"""What the recovery did: its loss, its validations, what it cost, and whether it helped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

from slimvlm.compress.runs import JOURNAL
from slimvlm.serve.report.charts import Curve, training_curve
from slimvlm.serve.report.document import Chart, Finding, Said, Table, figure, percent, shown, whole
from slimvlm.serve.report.files import Facts, RunFiles

RECOVER = "run.json: stages.recover"


def recovery_section(files: RunFiles) -> Iterator[Said]:
    """The recover stage."""
    stage = files.stage("recover")
    if not stage:
        text = "The cut model was not trained afterwards: there was no recovery."
        yield from (text, Finding(text, "run.json: stages has no recover"))
        return
    apart = stage["stages"][0]["steps"] if stage.get("blocks") else 0  # the journal is that of the whole model
    lines = [{**line, "step": apart + line["step"]} for line in files.journal or []]
    steps = [line for line in lines if "stage" in line]
    validations = [line for line in lines if "validation" in line]
    is_finished = stage.get("status") == "finished"
    if not is_finished:
        yield "The recovery is not finished: this is what its journal holds so far."
    yield (
        "Every stage has another sum of losses, so losses compare within a stage only; the numbers above the chart "
        "are the stages of the table."
    )
    if validations:
        yield (
            "The validation samples were held out of the training, by image. The last state that was not measurably "
            "worse on them than one before it was kept (ringed); step 0 is the cut model before any training"
            f"{f', step {apart} what its blocks had learnt by themselves' if apart else ''}."
        )
    if any(line["loss"] is not None for line in steps):
        yield _chart(steps, validations, stage.get("best_step"))
    if is_finished:
        yield from _findings(stage)
        yield _stage_table(stage)
        if "blocks" in stage:
            yield _block_table(stage)
    if validations:
        yield _validation_table(validations)
    if is_finished:
        yield _summary_table(stage)


def _findings(stage: Facts) -> Iterator[Finding]:
    if not stage["helped"]:
        text = (
            f"The recovery did not help: what {whole(stage['steps'])} steps gave was measurably worse on the "
            "validation samples than the cut model, which is kept as it was."
        )
        yield Finding(text, f"{RECOVER}.helped, .steps", bad=True)
    elif stage["first"] and stage["best"]:
        text = (
            f"The recovery took the validation score from {_scored(stage['first'])} to {_scored(stage['best'])} "
            f"(state of step {whole(stage['best_step'])} of {whole(stage['steps'])})."
        )
        yield Finding(text, f"{RECOVER}.first, .best, .best_step, .steps")
    else:
        text = "The recovery ran without validation samples: its last state was kept, whether better or not."
        yield Finding(text, f"{RECOVER}.first, .best", bad=True)
    if stage["skipped"]:
        text = f"{whole(stage['skipped'])} steps were skipped: their loss or gradient was not a finite number."
        yield Finding(text, f"{RECOVER}.skipped", bad=True)
    if stage["helped"] and stage["best"] and stage["last"] and stage["last"] != stage["best"]:
        text = (
            f"The last state was measurably worse, {_scored(stage['last'])}, so the one of step "
            f"{whole(stage['best_step'])} was kept."
        )
        yield Finding(text, f"{RECOVER}.last, .best_step")


def _scored(validation: list[float]) -> str:
    score, negative = validation
    return f"{percent(score)} with a loss of {figure(-negative)}"


def _chart(steps: list[Facts], validations: list[Facts], best_step: int | None) -> Chart:
    taken = [line for line in steps if line["loss"] is not None]
    stages = [[line["step"] for line in lines] for _, lines in groupby(steps, itemgetter("stage"))]
    scored = [(line["step"], line["validation"][0]) for line in validations]
    curve = Curve(
        steps=[line["step"] for line in taken],
        losses=[line["loss"] for line in taken],
        skipped=[line["step"] for line in steps if line["loss"] is None],
        stages=[(numbers[0], numbers[-1]) for numbers in stages],
        validations=[(step, score) for step, score in scored if score is not None],
        best_step=best_step,
    )
    return training_curve("training", "Loss of every optimiser step, and validations", curve)


def _summary_table(stage: Facts) -> Table:
    options = stage["options"]
    rows = [
        ("recipe", shown(options["recover"])),
        ("what was trained", shown(options["train"])),
        ("samples", whole(stage["samples"])),
        ("optimiser steps", whole(stage["steps"]) + (", stopped early" if stage["stopped_early"] else "")),
        ("steps skipped", whole(stage["skipped"])),
        ("input tokens", whole(stage["tokens"])),
        ("tokens per second", whole(stage["tokens_per_second"])),
        ("seconds", f"{stage['seconds']:.1f}"),
        ("peak memory of the process, MiB", whole(stage["peak_memory_bytes"] / 2**20)),
    ]
    return Table("What it took", ("", "value"), rows, f"{RECOVER}")


def _stage_table(stage: Facts) -> Table:
    rows = [
        (
            *(str(number), shown(part["name"]), whole(part["steps"]), whole(part["tokens"])),
            *(f"{part['seconds']:.1f}", figure(part["first_loss"]), figure(part["last_loss"])),
        )
        for number, part in enumerate(stage["stages"], start=1)
    ]
    columns = ("", "stage", "steps", "tokens", "seconds", "first loss", "last loss")
    return Table("Stages of the training", columns, rows, f"{RECOVER}.stages", texts=2)


def _block_table(stage: Facts) -> Table:
    rows = [
        (
            *(shown(one["block"]), figure(one["before"]), figure(one["after"])),
            whole(one["best_step"]) if one["best_step"] else "as it was cut",
        )
        for one in stage["blocks"]
    ]
    columns = ("block", "missed when cut", "missed when kept", "state of step")
    title = "Blocks by themselves: share of the dense output's energy that they miss on the validation samples"
    return Table(title, columns, rows, f"{RECOVER}.blocks", texts=1)


def _validation_table(lines: list[Facts]) -> Table:
    rows = []
    for line in lines:
        score, negative = line["validation"]
        shown_score = "not finite" if score is None else percent(score)
        rows.append(
            (
                *(whole(line["step"]), shown_score, figure(None if negative is None else -negative)),
                "kept so far" if line["best"] else "",
            )
        )
    source = f"{JOURNAL}: step, validation (score, minus loss), best"
    return Table("Validations", ("step", "score", "loss", ""), rows, source, texts=0)
