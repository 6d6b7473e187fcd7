"""One process of a study: it takes a cell that nobody else is at, measures it, writes its row, and takes the next."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any  # fields of a row

from slimvlm.compress.data.samples import digest_of
from slimvlm.compress.errors import InUseError, SlimvlmError, one_line
from slimvlm.compress.evaluation.quality import PRIMARY, Quality
from slimvlm.compress.files.lines import add_line
from slimvlm.compress.files.locks import locked_folder
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import locate
from slimvlm.compress.options import SparsifyOptions
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.runs import MODEL
from slimvlm.compress.stages.cut import cut_by_plan
from slimvlm.compress.stages.evaluate import evaluate_model, evaluate_seeing_and_blind
from slimvlm.compress.stages.sparsify import sparsify_model
from slimvlm.serve.study.making import Makings
from slimvlm.serve.study.study import (
    ACCEPTED_MISS,
    BLIND,
    DENSE,
    MEASURED,
    MISSED,
    RESULTS,
    TEST,
    VAL,
    Cell,
    Row,
    base_of,
    failed,
    kept_share,
    missing,
    read_rows,
)

CELLS, BASES = "cells", "bases"  # folders of a study
STAGES = {VAL: "study", TEST: "study, test"}  # how progress calls them
WAIT = 1.0  # seconds between two looks, where others are at all that is left
TRAINING = ("steps", "tokens_per_second", "best_step", "helped", "first", "best", "samples", "peak_memory_bytes")


@dataclass
class Worker:
    """In the folder `out`.

    Attributes:
        keep_models: leave the cut models in the folders of their cells.
    """

    out: Path
    makings: Makings
    keep_models: bool = False

    def work(self, cells: Sequence[Cell], split: str, progress: Progress = silent) -> None:
        """Until every cell has its row. A cell that fails has one that says why; the others go on."""
        while left := missing(cells, split, read_rows(self.out)):
            progress(STAGES[split], len(cells) - len(left), len(cells), left[0].name)
            if not any(self._try(cell, split) for cell in left):
                time.sleep(WAIT)
        progress(STAGES[split], len(cells), len(cells))

    def _try(self, cell: Cell, split: str) -> bool:
        """Whether this process has written the row of the cell, or of the dense model that it is compared with."""
        try:
            if self._base(cell, split):
                return True
            with locked_folder(folder := self.out / CELLS / cell.key):
                if not missing([cell], split, read_rows(self.out)):
                    return False
                self._write(self._row(cell, split))
                if not self.keep_models:  # with the lock: by now the cell has its row
                    shutil.rmtree(folder, ignore_errors=True)
        except InUseError:
            return False
        return True

    def _write(self, row: Row) -> None:
        add_line(self.out / RESULTS, row.to_line())

    def _base(self, cell: Cell, split: str) -> bool:
        """Whether this process has measured the dense model: on the questions, and with the images shuffled."""
        bed, began = cell.bed, time.monotonic()
        if base_of(read_rows(self.out), bed.name, split):
            return False
        with locked_folder(self.out / BASES / f"{bed.name}-{split}"):
            if base_of(read_rows(self.out), bed.name, split):
                return False
            questions = self.makings.questions(bed, split)
            asked = replace(cell.options, seed=0)
            dense, blind = evaluate_seeing_and_blind(asked, bed.model, questions, silent)
            facts = {"model_digest": locate(bed.model)[1], "questions_digest": digest_of(questions)}
            # The dense one last: when it is there, so is what others are compared with.
            for method, quality in ((BLIND, blind), (DENSE, dense)):
                if quality is not None:
                    seconds = _seconds(evaluation=quality.seconds, spent=time.monotonic() - began)
                    row = Row(
                        bed=bed.name, method=method, ratio=0.0, set=0, split=split, status=MEASURED, options=facts,
                        removed=0.0, versions=installed_versions(), seconds=seconds,
                    )  # fmt: skip
                    self._write(replace(row, **_figures(quality)))
            return True

    def _row(self, cell: Cell, split: str) -> Row:
        """What the cell gave, or why it gave nothing."""
        began, row = time.monotonic(), failed(cell, split, "")
        try:
            row = self._measured(cell, row)
        except InUseError:
            raise
        except SlimvlmError as refused:
            row = replace(row, reason=str(refused))
        except Exception as error:  # of a method under trial: the cell is lost, the others are not
            row = replace(row, reason=f"{type(error).__name__}: {one_line(error)}")
        return replace(row, seconds=_seconds(**row.seconds, spent=time.monotonic() - began))

    def _measured(self, cell: Cell, row: Row) -> Row:
        if cell.zeros is not None:
            return self._measured_zeros(cell, cell.zeros, row)
        plan, planning = self.makings.plan(cell)
        row = replace(row, removed=round(plan.removed_fraction, 6), seconds={"plan": planning})
        if abs(plan.removed_fraction - cell.options.ratio) > ACCEPTED_MISS:
            return replace(row, status=MISSED)
        folder, data = self.out / CELLS / cell.key, self.makings.samples(cell)
        run = cut_by_plan(folder, cell.options, plan, data, cache(partial(self.makings.trained, cell)), silent)
        trained, seconds = run.facts("recover"), {**row.seconds, "cut": run.facts("slice")["seconds"]}
        if trained:
            seconds["recovery"] = trained["seconds"]
        told = {name: trained[name] for name in TRAINING if name in trained}
        return self._evaluated(cell, str(run.path / MODEL), replace(row, training=told, seconds=seconds))

    def _measured_zeros(self, cell: Cell, zeros: SparsifyOptions, row: Row) -> Row:
        folder, began = self.out / CELLS / cell.key / MODEL, time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed at it
        done = sparsify_model(replace(zeros, out=folder))
        row = replace(row, removed=round(done.zeros, 6), seconds=_seconds(cut=time.monotonic() - began))
        if abs(done.zeros - cell.options.ratio) > ACCEPTED_MISS:
            return replace(row, status=MISSED)
        return self._evaluated(cell, str(folder), row)

    def _evaluated(self, cell: Cell, model: str, row: Row) -> Row:
        quality = evaluate_model(cell.options, model, self.makings.questions(cell.bed, row.split), silent)
        kept = kept_share(quality.score, read_rows(self.out), row.bed, row.split)
        seconds = {**row.seconds, "evaluation": quality.seconds}
        return replace(row, status=MEASURED, kept=kept, seconds=seconds, **_figures(quality))


def _figures(quality: Quality) -> Mapping[str, Any]:
    """What a row says of a quality."""
    primary = PRIMARY[quality.kind]
    return {
        "questions": len(quality.rows),
        "score": round(quality.score, 6),
        "token_loss": quality.scores.get("token_loss"),
        "tasks": {task: round(figures[primary], 6) for task, figures in quality.tasks.items()},
    }


def _seconds(**values: float) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}
