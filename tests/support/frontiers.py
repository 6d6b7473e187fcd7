"""Frontiers with figures that are easy to check: what a measurement would have written."""

from __future__ import annotations

from collections.abc import Mapping

from profiles import DEVICE, example_run

from slimvlm.compress.evaluation.quality import Comparison
from slimvlm.serve.frontier.frontier import Frontier, Point
from slimvlm.serve.profile import Cell, Ratio


def example_point(
    ratio: float, variant: str, size: int, drop: float, tpot: float = 4.0, beside: float | None = None
) -> Point:
    """`drop` in points, with an interval of half a point to either side; `tpot` in milliseconds, `beside` that of the
    dense model in turns with it, with an interval of 2 % to either side.
    """
    change = -drop / 100
    quality = Comparison(
        "exact", 0.97, 0.97 + change, change, change - 0.005, change + 0.005, 0.95, 2000, 0, 400, 200, {}
    )
    runs = {"slim": example_run(_seconds(tpot), 10 * size)}
    ratios = {}
    if beside is not None:
        runs["dense"], faster = example_run(_seconds(beside), 10 * size), beside / tpot
        ratios["tpot"] = Ratio(tpot / 1e3, beside / 1e3, faster, 0.98 * faster, 1.02 * faster, "faster")
    cell = Cell(f"onnx:{variant}", "fp32", 1, None, 32, 8, "measured", runs=runs, ratios=ratios)
    return Point(ratio, ratio, variant, f"cuts/{ratio:g}/export", size, quality, cell, 1.0)


def _seconds(tpot: float) -> dict[str, float]:
    return {"vision": 1e-3 * tpot, "ttft": 4e-3 * tpot, "tpot": 1e-3 * tpot}


def example_frontier(
    *points: Point, targets: tuple[str, ...] = (), skipped: Mapping[str, str] | None = None
) -> Frontier:
    """Of the demo's size."""
    facts = "demo", "llava", "d" * 64, DEVICE, {"torch": "2"}, {}
    return Frontier(*facts, points, skipped or {}, (), targets)
