"""The result of `slimvlm frontier` on stdout."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from slimvlm.console.printing import print_json, print_line, print_table

if TYPE_CHECKING:
    from pathlib import Path

    from slimvlm.serve.frontier.frontier import Frontier, Point


def show_frontier(frontier: Frontier, written: Path, *, as_json: bool) -> None:
    """Every artefact with what it costs and loses, and which to take."""
    from slimvlm.serve.frontier.choosing import recommend  # numpy takes a moment to import

    choices = [choice.sentence for choice in recommend(frontier)]
    if as_json:
        print_json({**asdict(frontier), "choices": choices})
        return
    print_line(f"device   {frontier.device.name} ({frontier.device.kind}), {frontier.device.threads} threads")
    names = ("", "size", "quality", "points lost", "first token", "per token")
    points = sorted(frontier.points, key=lambda one: (one.ratio, -one.bytes))
    print_table(names, [_row(frontier, point) for point in points])
    for sentence in choices:
        print_line(sentence)
    for name, reason in frontier.skipped.items():
        print_line(f"skipped  {name}: {reason}")
    if frontier.left:
        print_line(f"no time was left for {', '.join(frontier.left)}; --resume measures them")
    print_line(f"written  {written}")


def _row(frontier: Frontier, point: Point) -> tuple[str, ...]:
    times = (_milliseconds(frontier.cost(point, phase)) for phase in ("ttft", "tpot"))
    return point.name, f"{point.bytes / 1e6:.2f} MB", f"{100 * point.quality.slim:.1f} %", point.lost, *times


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"
