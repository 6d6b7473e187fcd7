"""The result of `slimvlm study` on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from slimvlm.console.printing import print_json, print_line
from slimvlm.serve.advising.rules import DEPTH, WIDTH
from slimvlm.serve.study.choosing import best
from slimvlm.serve.study.study import Row
from slimvlm.serve.study.tables import chosen_words, grids, lost_words, markdown

if TYPE_CHECKING:
    from slimvlm.serve.advising.advising import Advised

WAYS = {DEPTH: "drop whole blocks", WIDTH: "cut widths", None: "take a smaller model"}


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


def show_advice(advised: Advised, *, as_json: bool) -> None:
    """What the rules say of a model, why, and what slimvlm measured at such a ratio."""
    advice, asked = advised.advice, advised.asked
    if as_json:
        print_json(asdict(advised))
        return
    trained = f", then train {advice.train.replace('+', ' and ')} by {advice.recipe}" if advice.train else ""
    print_line(f"model    {advised.model} ({advised.family})")
    print_line(f"asked    {advised.ratio:.1%} of all parameters, which are {asked.share:.1%} of the language model")
    print_line(f"advice   {WAYS[advice.method]}{trained}, as VLMCompression (IJCV 2026) would")
    for reason in advice.reasons:
        print_line(f"{reason.rule:<9}{reason.text}")
    for note in (*advised.notes, *advice.cautions):
        print_line(f"but      {note}")
    for one in advised.figures:
        print_line(
            f"here     {one.method}: {one.score:.1%} right on {one.bed} at {one.ratio:.0%}, {one.kept:.0%} of dense "
            f"over blind, {one.sets} set{'s' * (one.sets > 1)} ({one.source})"
        )
    if advised.command:
        print_line(f"do       {advised.command}")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
