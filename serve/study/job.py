"""`slimvlm study`: every cell measured once, by one process or several side by side, in one results file."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch

from slimvlm.compress.errors import OutputError, SlimvlmError
from slimvlm.compress.files.folders import holds_others, refuse_inside
from slimvlm.compress.files.lines import add_line, change_lines
from slimvlm.compress.files.locks import holder_of
from slimvlm.compress.models.checkpoint import locate
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.recovery.checks import recipe_of
from slimvlm.compress.stages.plan import planning_of
from slimvlm.compress.stages.sparsify import asked_of
from slimvlm.serve.measuring.device import available_cores
from slimvlm.serve.measuring.worker import clean_server, nameless_main
from slimvlm.serve.study.choosing import best
from slimvlm.serve.study.making import Makings
from slimvlm.serve.study.options import BEST, StudyOptions
from slimvlm.serve.study.schedule import in_order
from slimvlm.serve.study.study import (
    MEASURED,
    RESULTS,
    TEST,
    VAL,
    Cell,
    Row,
    base_of,
    failed,
    missing,
    read_rows,
)
from slimvlm.serve.study.worker import CELLS, STAGES, Worker

LOOK = 1.0  # seconds between two looks at the processes
KILLED = (
    "the process that measured it was ended by {signal}, as the system does where memory ends; take less at once "
    "(--batch-size), or fewer --processes"
)


def run_study(options: StudyOptions, progress: Progress = silent) -> list[Row]:
    """Measure every cell that has no row yet; then, where that was asked for, chosen methods on the test questions.

    Returns:
        All rows of the results file, those of the study's cells first and in their order.

    Raises:
        SlimvlmError: refused, with the reason. What is wrong with a single cell is written into its row instead.
    """
    _prepare(options)
    cells = in_order(options.cells)
    _measure(options, cells, VAL, progress)
    if options.report_test:
        _measure(options, _chosen(options, cells), TEST, progress)
    change_lines(options.out / RESULTS, lambda _: [row.to_line() for row in _sorted(options)])
    return read_rows(options.out)


def _prepare(options: StudyOptions) -> None:
    """Refuse what would fail in every cell; forget what is to be tried again."""
    options.checked()
    for cell in {cell.method: cell for cell in options.cells}.values():
        try:
            planning_of(cell.options)
            if cell.zeros is not None:
                asked_of(cell.zeros)
            if cell.options.recover != "none":
                recipe_of(cell.options)
        except SlimvlmError as wrong:
            raise type(wrong)(f"row {cell.method!r}: {wrong}") from None
    for bed in options.beds:
        refuse_inside(options.out, {"model": bed.model, "data": bed.data, "val": bed.val, "test": bed.test})
    if options.out.exists() and holds_others(options.out) and not (options.out / RESULTS).is_file():
        raise OutputError(f"{options.out} is not empty and holds no study; choose an empty folder")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(options.out)
    for bed in options.beds:
        digest, base = locate(bed.model)[1], base_of(rows, bed.name, VAL)
        if base and base.options.get("model_digest", digest) != digest:
            raise OutputError(f"{options.out} has the bed {bed.name} with another model; choose another folder")
    if options.retry:
        keep = [row.to_line() for row in rows if row.status == MEASURED]
        change_lines(options.out / RESULTS, lambda _: keep)


def _chosen(options: StudyOptions, cells: Sequence[Cell]) -> list[Cell]:
    """What the test questions are for: all of a method that is named, and all sets of what was best."""
    found = best(read_rows(options.out), options.best_by) if BEST in options.report_test else []
    wanted = {(one.bed, one.method, one.ratio) for one in found}
    return [
        cell
        for cell in cells
        if cell.method in options.report_test or (cell.bed.name, cell.method, cell.options.ratio) in wanted
    ]


def _sorted(options: StudyOptions) -> list[Row]:
    """The dense models, the cells in the order they were written down, and what is of no cell."""
    left, bases = read_rows(options.out), [row for row in read_rows(options.out) if row.is_base]
    ordered = sorted(bases, key=lambda row: (row.bed, row.split, row.method != "dense"))
    left = [row for row in left if not row.is_base]
    for cell in options.cells:
        for split in (VAL, TEST):
            for row in [one for one in left if one.split == split and not missing([cell], split, [one])]:
                ordered.append(row)
                left.remove(row)
    return [*ordered, *left]


def _measure(options: StudyOptions, cells: Sequence[Cell], split: str, progress: Progress) -> None:
    if options.processes == 1:
        Worker(options.out, Makings(options.out), options.keep_models).work(cells, split, progress)
    else:
        _Crew(options, cells, split).work(progress)


@dataclass
class _Crew:
    """Processes side by side, and one that watches them."""

    options: StudyOptions
    cells: Sequence[Cell]
    split: str

    def work(self, progress: Progress) -> None:
        """Until every cell has its row."""
        total = len(self.cells)
        left = list(self.cells)
        members = [self._member() for _ in range(min(self.options.processes, total))]
        try:
            while members:
                for member in [one for one in members if not one.process.is_alive()]:
                    members.remove(member)
                    if self._is_lost(member):
                        members.append(self._member())
                left = missing(self.cells, self.split, read_rows(self.options.out))
                if left:
                    progress(STAGES[self.split], total - len(left), total, left[0].name)
                    time.sleep(LOOK)
        finally:
            for member in members:
                member.process.kill()
                member.process.join()
        if left:
            raise OutputError(f"all processes ended, and {len(left)} cells have no row; run the same command again")
        progress(STAGES[self.split], total, total)

    def _member(self) -> _Member:
        context = clean_server()
        ours, theirs = context.Pipe()
        threads = max(1, available_cores() // self.options.processes)
        worker = Worker(self.options.out, Makings(self.options.out), self.options.keep_models)
        process = context.Process(target=_serve, args=(theirs, worker, self.cells, self.split, threads), daemon=True)
        with nameless_main():
            process.start()
        theirs.close()
        return _Member(process, ours)

    def _is_lost(self, member: _Member) -> bool:
        """Whether the process was killed at a cell, which then has a row that says so.

        Raises:
            SlimvlmError: what the process could not go on for.
        """
        with suppress(EOFError):
            raise member.connection.recv()
        code = member.process.exitcode or 0
        for cell in missing(self.cells, self.split, read_rows(self.options.out)):
            if code < 0 and holder_of(self.options.out / CELLS / cell.key) == member.process.pid:
                row = failed(cell, self.split, KILLED.format(signal=signal.Signals(-code).name))
                add_line(self.options.out / RESULTS, row.to_line())
                return True
        return False


class _Member(NamedTuple):
    process: BaseProcess
    connection: Connection


def _serve(connection: Connection, worker: Worker, cells: Sequence[Cell], split: str, threads: int) -> None:
    """In a process of its own: work, and send what it could not go on for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    try:
        worker.work(cells, split)
    except SlimvlmError as refused:
        connection.send(refused)
