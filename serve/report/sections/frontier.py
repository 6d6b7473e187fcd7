"""Prune, quantise, or both: every artefact that was measured, and which to take."""

from __future__ import annotations

from collections.abc import Iterator

from slimvlm.compress.runs import FRONTIER
from slimvlm.serve.fitting.goals import read_goals
from slimvlm.serve.frontier.choosing import costs_of, pareto, recommend
from slimvlm.serve.frontier.frontier import Frontier, Point
from slimvlm.serve.report.charts import Estimate, Mark, trade_dots
from slimvlm.serve.report.document import Chart, Finding, Said, Table, figure, percent, shown, whole
from slimvlm.serve.report.files import RunFiles

AXES = {  # cost: what a figure is divided by, the axis, its name
    "size": (1e6, "MB on disk", "size"),
    "tpot": (1.0, "ms per later token", "time per token"),
    "vision": (1.0, "ms from pixels to features", "time of the vision tower"),
}


def frontier_section(files: RunFiles) -> Iterator[Said]:
    """Nothing where no frontier was measured."""
    if files.frontier is not None:
        yield from frontier_said(files.frontier)


def frontier_said(frontier: Frontier) -> Iterator[Said]:
    """The charts, the table, and what to take."""
    points = frontier.points
    if not points:
        yield Finding("No artefact was measured.", f"{FRONTIER}: points", bad=True)
        return
    yield (
        f"Every artefact was {_timed(frontier)}asked the same {whole(points[0].quality.questions)} questions. "
        "The bars are 95 % intervals of the difference to the dense model in full precision; the line joins what no "
        "other artefact beats, which the table marks with a star."
    )
    for choice in recommend(frontier):
        yield Finding(shown(choice.sentence), f"{FRONTIER}: points", bad=choice.point is None)
    yield from (_chart(frontier, cost) for cost in costs_of(frontier))
    yield _table(frontier)
    for name, reason in frontier.skipped.items():
        yield Finding(shown(f"{name}: {reason}"), f"{FRONTIER}: skipped", bad=True)
    if frontier.left:
        yield f"There was no time for {shown(', '.join(frontier.left))}; --resume measures them."


def _timed(frontier: Frontier) -> str:
    """On what, and beside what; nothing where times were not taken."""
    cells = [point.cell for point in frontier.points if point.cell is not None]
    if not cells:
        return ""
    paired = any(cell.ratios for cell in cells)  # a run's own table has the times of its profile
    beside = "the dense model in full precision" if paired else "the other model in the same precision"
    return f"timed on {shown(frontier.device.name)}, {frontier.device.threads} threads, beside {beside}, and "


def _chart(frontier: Frontier, cost: str) -> Chart:
    divisor, axis, name = AXES[cost]
    best = pareto(frontier, cost)
    marks = [
        Mark(
            "dense" if point.is_dense else "slim",
            point.variant if point.is_dense else f"{100 * point.removed:.0f} % {point.variant}",
            value / divisor,
            _estimate(point),
            point in best,
        )
        for point in frontier.points
        if (value := frontier.cost(point, cost)) is not None
    ]
    bounds = [goal.amount / divisor for goal in read_goals(frontier.targets) if goal.name == cost]
    return trade_dots(f"frontier-{cost}", f"Quality over {name}", marks, axis, bounds)


def _estimate(point: Point) -> Estimate:
    """The quality; its interval is that of the difference to the dense model."""
    found = point.quality
    return Estimate(found.slim, found.dense + found.low, found.dense + found.high)


def _table(frontier: Frontier) -> Table:
    columns = (
        "artefact",
        "removed",
        "size, MB",
        "quality",
        "points lost",
        "first token, ms",
        "per token, ms",
        "peak, MB",
    )
    best = {cost: pareto(frontier, cost) for cost in ("size", "tpot")}
    rows = [
        (
            shown(point.name) + ("*" if any(point in line for line in best.values()) else ""),
            percent(point.removed),
            f"{point.bytes / 1e6:.2f}",
            percent(point.quality.slim),
            point.lost,
            _time(frontier, point, "ttft"),
            _time(frontier, point, "tpot"),
            figure(None if (peak := point.memory(frontier.device.kind)) is None else peak / 1e6),
        )
        for point in frontier.points
    ]
    return Table(
        "Dense and slim, in every precision",
        columns,
        rows,
        f"{FRONTIER}: points",
    )


def _time(frontier: Frontier, point: Point, phase: str) -> str:
    """The time, and how many times as fast as the dense model in full precision, with its interval."""
    value, ratio = frontier.cost(point, phase), point.faster(phase)
    faster = "" if ratio is None else f" ({ratio.value:.2f} x, {ratio.low:.2f} to {ratio.high:.2f})"
    return "-" if value is None else f"{value:.3g}{faster}"
