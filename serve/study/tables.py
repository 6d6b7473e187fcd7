"""A study in figures for people: a table per bed and split, a row per method, a column per ratio. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimvlm.serve.study.choosing import Range, Summary, best, summaries
from slimvlm.serve.study.study import BLIND, DENSE, FAILED, MISSED, Row, base_of


@dataclass(frozen=True, slots=True)
class Grid:
    """One bed on one split; `rows`: texts, the first of each names the method.

    Attributes:
        head: what the models without a cut reach, in a sentence.
    """

    bed: str
    split: str
    head: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(rows: Sequence[Row]) -> list[Grid]:
    """All tables of a study."""
    found = summaries(rows)
    return [_grid(rows, found, *key) for key in dict.fromkeys((one.bed, one.split) for one in found)]


def markdown(grid: Grid) -> str:
    """A table as it stands in a page."""
    lines = [f"| {' | '.join(cells)} |" for cells in (grid.columns, ("---",) * len(grid.columns), *grid.rows)]
    return "\n".join([grid.head, "", *lines])


def chosen_words(rows: Sequence[Row], chosen_by: str) -> list[str]:
    """The best method of every bed and ratio, in a sentence each."""
    return [
        f"Best on {one.bed} at {100 * one.ratio:g} %: {one.method}, {words(one)} by {chosen_by}, "
        f"{len(one.measured)} set{'s' * (len(one.measured) > 1)}."
        for one in best(rows, chosen_by)
    ]


def lost_words(rows: Sequence[Row]) -> list[str]:
    """What failed, in a sentence each."""
    return [
        f"{row.bed}, {row.method}, {100 * row.ratio:g} %, set {row.set} ({row.split}): {row.reason}"
        for row in rows
        if row.status == FAILED
    ]


def words(one: Summary, sets: int = 0) -> str:
    """`93.1 (92.0-94.0), 86 %`: mean and range of the score over sets, and the chance-corrected share of the dense one.

    Args:
        sets: that others have; fewer are said.
    """
    if (score := one.score) is None:
        missed = any(row.status == MISSED for row in one.rows)
        return f"missed, {_percent(one.removed)} removed" if missed else "failed"
    span = f"{100 * score.mean:.1f}"
    if len(one.measured) > 1:
        span += f" ({100 * score.low:.1f}-{100 * score.high:.1f})"
    kept = "" if one.kept is None else f", {100 * one.kept.mean:.0f} %"
    few = "" if len(one.measured) >= sets else f", {len(one.measured)} of {sets} sets"
    return f"{span}{kept}{few}"


def _grid(rows: Sequence[Row], found: Sequence[Summary], bed: str, split: str) -> Grid:
    mine = [one for one in found if (one.bed, one.split) == (bed, split)]
    ratios = sorted({one.ratio for one in mine})
    sets = max(len(one.rows) for one in mine)
    lines = []
    for method in dict.fromkeys(one.method for one in mine):
        by_ratio = {one.ratio: one for one in mine if one.method == method}
        cells = [words(by_ratio[ratio], sets) if ratio in by_ratio else "-" for ratio in ratios]
        removed = ", ".join(_percent(by_ratio[ratio].removed) if ratio in by_ratio else "-" for ratio in ratios)
        seconds = [one.planning.mean for one in by_ratio.values() if one.planning]
        lines.append((method, *cells, removed, f"{sum(seconds) / len(seconds):.0f}" if seconds else "-"))
    columns = ("method", *(f"{100 * ratio:g} % removed" for ratio in ratios), "removed", "seconds per plan")
    dense, blind = (base_of(rows, bed, split, method) for method in (DENSE, BLIND))
    words_of = [f"{row.method} {100 * (row.score or 0.0):.1f}" for row in (dense, blind) if row]
    asked = f"{dense.questions} questions of {split}" if dense else split
    return Grid(bed, split, f"{bed}: {', '.join(words_of)} (mean of tasks, {asked})", columns, tuple(lines))


def _percent(value: Range | None) -> str:
    return "-" if value is None else f"{100 * value.mean:.1f} %"
