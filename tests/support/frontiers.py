"""Frontiers with figures that are easy to check: what a measurement would have written."""

from __future__ import annotations

from collections.abc import Mapping

from profiles import DEVICE, example_run

from slimvlm.compress.evaluation.quality import Comparison
from slimvlm.serve.frontier.frontier import Frontier, Point
from slimvlm.serve.profile import Cell


def example_point(ratio: float, variant: str, size: int, drop: float, tpot: float = 4.0) -> Point:
    """`drop` in points, with an interval of half a point to either side; `tpot` in milliseconds."""
    change = -drop / 100
    quality = Comparison(
        "exact", 0.97, 0.97 + change, change, change - 0.005, change + 0.005, 0.95, 2000, 0, 400, 200, {}
    )
    seconds = {"vision": 1e-3 * tpot, "ttft": 4e-3 * tpot, "tpot": 1e-3 * tpot}
    cell = Cell(f"onnx:{variant}", "fp32", 1, None, 32, 8, "measured", runs={"slim": example_run(seconds, 10 * size)})
    return Point(ratio, ratio, variant, f"cuts/{ratio:g}/export", size, quality, cell, 1.0)


def example_frontier(
    *points: Point, targets: tuple[str, ...] = (), skipped: Mapping[str, str] | None = None
) -> Frontier:
    """Of the demo's size."""
    facts = "demo", "llava", "d" * 64, DEVICE, {"torch": "2"}, {}
    return Frontier(*facts, points, skipped or {}, (), targets)
