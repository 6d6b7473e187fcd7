"""The result of `slimvlm study` on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from slimvlm.console.printing import print_json, print_line
from slimvlm.serve.study.choosing import best
from slimvlm.serve.study.study import Row
from slimvlm.serve.study.tables import chosen_words, grids, lost_words, markdown


def show_study(rows: Sequence[Row], chosen_by: str, written: Path, *, as_json: bool) -> None:
    """A table for each bed and split, the best methods, and what gave nothing."""
    if as_json:
        chosen = [{"bed": one.bed, "ratio": one.ratio, "method": one.method} for one in best(rows, chosen_by)]
        print_json({"rows": [asdict(row) for row in rows], "best": chosen, "best_by": chosen_by})
        return
    for grid in grids(rows):
        print_line(f"{markdown(grid)}\n")
    for sentence in chosen_words(rows, chosen_by):
        print_line(sentence)
    for sentence in lost_words(rows):
        print_line(f"failed   {sentence}")
    print_line(f"written  {written}")


def work_words(left: int, total: int, seconds: float | None, processes: int) -> str:
    """What is to be done, and how long it takes."""
    many = f"with {processes} processes" if processes > 1 else "with one process"
    time = "how long is known after the first ones" if seconds is None else f"about {_duration(seconds)} {many}"
    return f"{left} of {total} cells to measure; {time}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
