"""Progress on stderr, of the first of several processes, and what the streams take."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.progress import Progress, silent

QUIET_SECONDS = 30  # at most so long nothing is said where there is no terminal
SURE_SECONDS = 2  # of steps tell how long the others take
PART = re.compile(r"\w+ \d+ of \d+")  # a note that says in which part a stage is


def print_anything() -> None:
    """Characters that a terminal cannot show are escaped, and bytes that are no text replaced: file names hold both."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def is_first_process() -> bool:
    """Whether this process is the one that prints; a launcher gives each its RANK."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """A function that shows (stage, done, total) on stderr: bars on a terminal, else one line per finished stage."""
    if quiet or not is_first_process():
        yield silent
    elif sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _Lines()


def show_job(job: Callable[[Progress], Any], shown: Callable[[Any], None], quiet: bool) -> None:
    """Show what a job gave, also when a check on it failed."""
    with progress(quiet) as report:
        try:
            result = job(report)
        except CheckFailedError as failed:
            if failed.result is not None:
                shown(failed.result)
            raise
    shown(result)


class _Lines:
    """One line per finished stage, or round of one, with the seconds since the stage before and what is left. A long
    stage has one as soon as its first steps tell how long it will take, and then now and then one.
    """

    def __init__(self) -> None:
        self.since = self.spoke = time.perf_counter()
        self.first: tuple[str, int, float] | None = None  # stage, steps done and time at its first report
        self.estimated = False
        self.unsaid: tuple[str, str] | None = None  # the round of the last report, and its line

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None:
        label, note = (f"{note}: {stage}", "") if PART.fullmatch(note) else (stage, note)
        if self.unsaid and self.unsaid[0] != label:
            click.echo(self.unsaid[1], err=True)  # the round is over
        now = time.perf_counter()
        if self.first is None or self.first[0] != stage:
            self.first, self.estimated = (stage, done, now), False
        _, begun, began = self.first
        # The first step warms up, and what is before it is no step: it counts only while there is no other.
        rate = (now - began) / (done - begun) if done > begun else (now - self.since) / max(done, 1)
        left = rate * (total - done)
        estimates = not self.estimated and begun < done and now - began > SURE_SECONDS and left > QUIET_SECONDS
        rest = f"about {duration(left)} left  " if 0 < done < total else ""
        line = f"{label:<24}{done:>8}/{total}  {now - self.since:8.1f} s  {rest}{note}".rstrip()
        self.unsaid = (label, line) if label != stage else None
        if done >= total or estimates or now - self.spoke > QUIET_SECONDS:
            self.estimated |= estimates
            click.echo(line, err=True)
            self.spoke, self.unsaid = now, None
        if done >= total:
            self.since, self.first = now, None


def duration(seconds: float) -> str:
    """Of seconds, for people: 40 s, 12 min, 5.2 h."""
    if seconds < 2 * 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 60 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    note_column = TextColumn("{task.fields[note]}")
    with Bars(*columns, TimeRemainingColumn(), note_column, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int, note: str = "", /) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)
            if done >= total:
                del tasks[stage]

        yield report
