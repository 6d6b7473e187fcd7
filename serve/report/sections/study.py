"""Methods side by side: tables, quality over ratio and over planning time, what was best and what failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slimvlm.serve.report.charts import Estimate, Mark, trade_dots
from slimvlm.serve.report.document import Chart, Finding, Said, Table, shown
from slimvlm.serve.report.ranges import LINES, range_lines
from slimvlm.serve.study.choosing import Range, Summary, summaries
from slimvlm.serve.study.study import MISSED, RESULTS, Row
from slimvlm.serve.study.tables import chosen_words, grids, lost_words


def study_said(rows: Sequence[Row], chosen_by: str) -> Iterator[Said]:
    """All of a study, bed by bed."""
    found = summaries(rows)
    if not found:
        yield Finding("No cell was measured.", RESULTS, bad=True)
        return
    yield (
        "A figure is the mean over calibration sets, then the lowest and the highest of them, and the share of the "
        "dense model that is left, where the model without its images has 0 % and the dense one 100 %. "
        "Seconds per plan are those of one process, calibrations included."
    )
    for sentence in chosen_words(rows, chosen_by):
        yield Finding(shown(sentence), RESULTS)
    for number, grid in enumerate(grids(rows), start=1):
        mine = [one for one in found if (one.bed, one.split) == (grid.bed, grid.split) and one.score]
        yield from _charts(f"study-{number}", mine)
        yield Table(shown(grid.head), grid.columns, [tuple(map(shown, row)) for row in grid.rows], RESULTS)
    for sentence in lost_words(rows):
        yield Finding(shown(sentence), f"{RESULTS}: reason", bad=True)
    if missed := sum(row.status == MISSED for row in rows):
        yield Finding(f"{missed} cuts removed another share than was asked for, and were not evaluated.", RESULTS, True)


def _charts(name: str, found: Sequence[Summary]) -> Iterator[Chart]:
    where = f"{found[0].bed}, {found[0].split}" if found else ""
    methods: dict[str, list[tuple[float, Estimate]]] = {}
    for one in sorted(found, key=lambda one: one.ratio):
        methods.setdefault(one.method, []).append((one.ratio, _estimate(one.score)))
    ranked = sorted(methods, key=lambda method: _level(methods[method]), reverse=True)
    lines = {method: methods[method] for method in ranked[: len(LINES)]}
    if lines:
        few = f" (the best {len(lines)} of {len(methods)})" if len(lines) < len(methods) else ""
        yield range_lines(f"{name}-ratio", f"Quality over what is removed: {where}{few}", lines, "removed, %")
    for ratio in sorted({one.ratio for one in found}):
        timed = [one for one in found if one.ratio == ratio and one.planning and one.planning.mean > 0]
        if len(timed) > 1:
            title = f"Quality over planning time: {where}, {100 * ratio:g} % removed"
            yield trade_dots(f"{name}-seconds-{100 * ratio:g}".replace(".", "-"), title, _marks(timed), "seconds")


def _marks(timed: Sequence[Summary]) -> list[Mark]:
    """Every method; the best are those that no faster one beats."""
    marks, highest = [], 0.0
    for one in sorted(timed, key=lambda one: (_mean(one.planning), -_mean(one.score))):
        is_best, highest = _mean(one.score) > highest, max(highest, _mean(one.score))
        marks.append(Mark("cut", shown(one.method), _mean(one.planning), _estimate(one.score), is_best))
    return marks


def _level(points: Sequence[tuple[float, Estimate]]) -> tuple[int, float]:
    return len(points), sum(one.value for _, one in points)


def _mean(value: Range | None) -> float:
    return value.mean if value else 0.0


def _estimate(value: Range | None) -> Estimate:
    return Estimate(value.mean, value.low, value.high) if value else Estimate(0.0, 0.0, 0.0)
