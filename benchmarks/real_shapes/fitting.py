"""The model of the cost (serve/costing) against what `benchmarks/scale.py` measured, and its factors fitted to that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from real_shapes.making import ANSWER, QUESTION
from real_shapes.shapes import DTYPE, SHAPES, WHOLE
from transformers import AutoModelForImageTextToText

from slimvlm.compress.models.families import find_family
from slimvlm.serve.costing.anatomy import Anatomy, model_anatomy
from slimvlm.serve.costing.asked import Asked
from slimvlm.serve.costing.cost import CostModel, cost_of
from slimvlm.serve.costing.factors import RESOURCES, Factors, Ideal, fitted
from slimvlm.serve.costing.machines import MACHINES, Machine

Row = Mapping[str, Any]  # a line of scale.jsonl
STAGES = ("plan", "slice", "export")
TRUST = 0.05  # how much a factor as it is weighs against one measured time


@dataclass(frozen=True)
class Point:
    """A time or a peak that was measured, and what the model says of it: `said`, made of `ideal` where it is a time."""

    shape: str
    stream: str
    what: str
    measured: float
    said: float
    ideal: Ideal | None = None

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.said / self.measured - 1


@cache
def anatomy(name: str) -> Anatomy:
    """Of a row of SHAPES."""
    return _anatomy(SHAPES[name].config(), SHAPES[name].side)


def _anatomy(config: Any, side: int | None = None) -> Anatomy:
    config.dtype = DTYPE
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=DTYPE)
    return model_anatomy(model, find_family(config), side)


def costs() -> list[dict[str, Any]]:
    """What the default compression takes of real models, whole ones, on the known machines."""
    found = []
    for name, config in WHOLE.items():
        model = _anatomy(config())
        for machine in MACHINES:
            cost = cost_of(model, Asked(), MACHINES[machine])
            found.append({"model": name, "device": machine, "disk_bytes": cost.disk_bytes, **asdict(cost)})
    return found


def cost_model(
    row: Row, machine: Machine, text_tokens: int = 2 * QUESTION, factors: Factors | None = None
) -> CostModel:
    """Of a run of `benchmarks/scale.py`: the checkpoint was just written, and is read from the system's cache."""
    asked = Asked(
        samples=row["samples"],
        ratio=SHAPES[row["shape"]].ratio,
        rounds=row["rounds"],
        refit=row["compensation"] != "none",
        text_tokens=text_tokens,
        answer_tokens=ANSWER + 1,
        cached=True,
    )
    return CostModel(anatomy(row["shape"]), asked, machine, factors)


def points(rows: Iterable[Row], factors: Factors | None = None) -> list[Point]:
    """Every time and every peak; times only of runs that had the machine to themselves."""
    return [point for row in rows for point in _points(row, factors or fitted())]


def _points(row: Row, factors: Factors) -> Iterator[Point]:
    stages, streamed = row["stages"], row["stream"] == "on"
    text = stages.get("plain", {}).get("tokens", [0, 0])[1]
    model = cost_model(row, Machine(**row["machine"]), text, factors)
    where = row["shape"], row["stream"]
    stages = {name: facts for name, facts in stages.items() if name != "export" or "slice" in stages}  # of a cut model
    ideals = {
        "plain": ("per_sample", model.passes(1, 1, 1)),
        "calibrate": ("per_sample", model.calibration(row["samples"], streamed).times(1 / row["samples"])),
        **{name: ("seconds", model.ideal(name, streamed)) for name in STAGES},
    }
    for name, (what, ideal) in ideals.items():
        if what in stages.get(name, {}) and row["alone"]:
            yield Point(*where, f"{name}: seconds", stages[name][what], model.sum(ideal), ideal)
    for name in STAGES:
        if "peak_bytes" in stages.get(name, {}):
            yield Point(*where, f"{name}: peak bytes", stages[name]["peak_bytes"], model.peak(name, streamed))
        if streamed and "read_bytes" in stages.get(
            name, {}
        ):  # else weights are mapped, and what is read is not counted
            yield Point(*where, f"{name}: bytes read", stages[name]["read_bytes"], model.read(name, streamed))


def fit(rows: Sequence[Row]) -> Factors:
    """The factors on seconds that leave the least squares of relative errors; what no time depends on stays."""
    before = np.array([fitted()["seconds"][name] or 1.0 for name in RESOURCES])  # one that was left out may come back
    timed = [point for point in points(rows) if point.ideal is not None]
    shares = [[getattr(point.ideal, name) / point.measured for name in RESOURCES] for point in timed]
    system = np.vstack([np.array(shares).reshape(-1, len(RESOURCES)), np.diag(TRUST / before)])
    target = np.concatenate([np.ones(len(timed)), np.full(len(RESOURCES), TRUST)])
    used = np.ones(len(RESOURCES), dtype=bool)
    while True:  # a factor below zero is none
        found = np.zeros(len(RESOURCES))
        found[used] = np.linalg.lstsq(system[:, used], target, rcond=None)[0]
        if (found >= 0).all():
            break
        used &= found > 0
    seconds = {name: round(float(factor), 3) for name, factor in zip(RESOURCES, found, strict=True)}
    runs = sorted({f"{point.shape}, streamed {point.stream}" for point in timed})
    return Factors(seconds=seconds, bytes=fitted()["bytes"], runs=runs)


def table(rows: Sequence[Row]) -> str:
    """What was measured, what the model says, and its error; at the end the sums of the seconds of each run, and what a
    sample of our calibration takes against a plain forward and backward pass.
    """
    found = points(rows)
    lines = [f"{'':44} {'measured':>12} {'model':>12} {'error':>7}"]
    for point in found:
        scale, unit = (2**30, "GiB") if "bytes" in point.what else (1, "s")
        name = f"{point.shape}, streamed {point.stream}, {point.what}"
        numbers = f"{point.measured / scale:>9.2f} {unit:>2} {point.said / scale:>9.2f} {unit:>2}"
        lines.append(f"{name:60} {numbers} {point.error:>+7.0%}")
    for (shape, stream), error in totals(found).items():
        lines.append(f"{f'{shape}, streamed {stream}, all stages: seconds':60} {error:>+33.0%}")
    for row in rows:
        ours, plain = (row["stages"].get(stage, {}).get("per_sample") for stage in ("calibrate", "plain"))
        if ours and plain:
            lines.append(f"{row['shape']}, streamed {row['stream']}: a sample takes {ours / plain:.2f} x a plain pass")
    return "\n".join(lines)


def totals(found: Iterable[Point]) -> dict[tuple[str, str], float]:
    """Error of the seconds of plan, slice and export together, by (shape, streamed)."""
    sums: dict[tuple[str, str], list[float]] = {}
    for point in found:
        if point.ideal is not None and point.what.startswith(STAGES):
            both = sums.setdefault((point.shape, point.stream), [0.0, 0.0])
            both[0] += point.measured
            both[1] += point.said
    return {run: said / measured - 1 for run, (measured, said) in sums.items()}
