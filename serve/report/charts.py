"""The charts: matplotlib draws them as SVG with text as text, and the page's style sheet colours them.

Colours are written as CSS variables, so that one drawing is readable in light, in dark and on paper. No date and no
random names: the same figures give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import Transform

from slimvlm.serve.report.document import Chart, shown

WIDTH = 3.75  # inches: narrow enough for a telephone, so that letters stay legible there
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# Placeholders for the style sheet's variables: matplotlib takes colours only.
VARIABLES = ("ink", "quiet", "grid", "dense", "cut", "slim", "whole")
INK, QUIET, GRID, DENSE, CUT, SLIM, WHOLE = (f"#00000{number}" for number in range(1, len(VARIABLES) + 1))
COLOURS = {"dense": DENSE, "cut": CUT, "slim": SLIM, "vision": SLIM, "language": CUT}
COLOURS |= {"text": CUT, "first token": INK, "per token": CUT, "end to end": DENSE}
MARKERS = {"dense": "o", "cut": "^", "slim": "s"}
MARKERS |= {"vision": "s", "text": "^", "first token": "D", "per token": "^", "end to end": "o"}
DASHES = {"vision": "-", "language": "--"}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with a dollar sign is a name
    "axes.unicode_minus": False,
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.6,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
}
WIDE_RATIOS = 8  # of speed-ups, from which on their axis is logarithmic
POINTS = 400  # of a line; more are averaged
TICK_LETTERS = 18


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A training.

    Attributes:
        steps, losses: of the steps that were not skipped.
        stages: (first step, last step) of each stage, in order.
        validations: (step, score 0 to 1).
        best_step: the state that was kept.
    """

    steps: Sequence[int]
    losses: Sequence[float]
    skipped: Sequence[int]
    stages: Sequence[tuple[int, int]]
    validations: Sequence[tuple[int, float]]
    best_step: int | None


@dataclass(frozen=True, slots=True)
class Mark:
    """An artefact in a chart of quality (0 to 1, with its interval) over cost; `is_best`: no other one beats it."""

    kind: str
    label: str
    cost: float
    quality: Estimate
    is_best: bool


def kept_bars(name: str, title: str, layers: Sequence[int], kept: Sequence[int], sizes: Sequence[int]) -> Chart:
    """A bar per layer: what it keeps, before what it had."""
    with drawn(name, title, 1.9) as (figure, charts):
        axes = figure.subplots()
        axes.bar(layers, sizes, color=WHOLE, width=0.8, label="dense")
        axes.bar(layers, kept, color=SLIM, width=0.8, label="kept")
        axes.set(xlabel="layer", ylim=(0, max(sizes) * 1.02), xlim=(min(layers) - 0.6, max(layers) + 0.6))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        finish(axes, "y")
        legend(axes, 2)
    return charts[0]


def size_bars(name: str, title: str, parts: Sequence[str], before: Sequence[int], after: Sequence[int]) -> Chart:
    """Two lying bars per part of the model, in millions."""
    with drawn(name, title, 0.6 + 0.36 * len(parts)) as (figure, charts):
        axes = figure.subplots()
        places = np.arange(len(parts))
        axes.barh(places, np.array(before) / 1e6, color=WHOLE, height=0.7, label="before")
        axes.barh(places, np.array(after) / 1e6, color=SLIM, height=0.7, label="after")
        _name_rows(axes, parts)
        axes.set_xlabel("million parameters")
        finish(axes, "x")
        legend(axes, 2)
    return charts[0]


def memory_bars(name: str, title: str, rows: Mapping[str, Mapping[str, tuple[float, float]]]) -> Chart:
    """A pair of lying bars per row and one per model: bytes after loading, and at the peak (the paler end)."""
    with drawn(name, title, 0.75 + 0.42 * len(rows)) as (figure, charts):
        axes = figure.subplots()
        models = list(dict.fromkeys(model for found in rows.values() for model in found))
        for side, behind in ((0, 2), (1, 1)):
            for place, model in enumerate(models):
                chosen = [
                    (row, found[model][side] / 2**20) for row, found in enumerate(rows.values()) if model in found
                ]
                at = np.array([row for row, _ in chosen]) + 0.36 * (place - (len(models) - 1) / 2)
                colour, label = (COLOURS[model], WHOLE)[side], (model, "_" if place else "peak")[side]
                axes.barh(at, [size for _, size in chosen], height=0.32, color=colour, label=label, zorder=behind)
        _name_rows(axes, list(rows))
        axes.set_xlabel("MiB after loading, and at the peak")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        finish(axes, "x")
        legend(axes, 3)
    return charts[0]


def score_steps(name: str, title: str, by_modality: Mapping[str, np.ndarray]) -> Chart:
    """Distribution of positive scores per modality, on a logarithmic axis."""
    with drawn(name, title, 2.1) as (figure, charts):
        axes = figure.subplots()
        logs = {modality: np.log10(scores[scores > 0].astype(np.float64)) for modality, scores in by_modality.items()}
        found = np.concatenate(list(logs.values()))
        edges = np.linspace(found.min(), found.max() + 1e-9, 33).tolist()
        for modality, values in logs.items():
            if len(values):
                weights = np.full(len(values), 1 / len(by_modality[modality]))
                colour, dashes = COLOURS.get(modality, DENSE), DASHES.get(modality, ":")
                axes.hist(
                    values, edges, weights=weights, histtype="step", linewidth=1.3,
                    edgecolor=colour, linestyle=dashes, label=_short(modality),
                )  # fmt: skip
        axes.set(xlabel="score (logarithmic)", ylabel="share of units")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.xaxis.set_major_formatter(lambda value, _: f"1e{value:.0f}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        finish(axes, "y")
        legend(axes, 2)
    return charts[0]


def training_curve(name: str, title: str, curve: Curve) -> Chart:
    """Loss over steps, broken at stage boundaries (their losses are different sums), and the validations below."""
    with drawn(name, title, 3.3 if curve.validations else 2.2) as (figure, charts):
        if curve.validations:
            upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
            _draw_validations(lower, curve)
        else:
            upper = lower = figure.subplots()
        for first, last in curve.stages:
            chosen = [place for place, step in enumerate(curve.steps) if first <= step <= last]
            _draw_losses(upper, [curve.steps[place] for place in chosen], [curve.losses[place] for place in chosen])
        if curve.losses and min(curve.losses) > 0 and max(curve.losses) > 20 * min(curve.losses):
            upper.set_yscale("log")
            upper.yaxis.set_major_formatter(_plain)
            upper.yaxis.set_minor_formatter(NullFormatter())
        if curve.skipped:
            upper.plot(curve.skipped, [0.02] * len(curve.skipped), "x", color=CUT, transform=_across(upper))
        for axes in dict.fromkeys((upper, lower)):
            for first, _ in curve.stages[1:]:
                axes.axvline(first - 0.5, color=QUIET, linewidth=0.6, linestyle=":")
            finish(axes, "y")
        _number_stages(upper, curve.stages)
        upper.set_ylabel("loss")
        lower.set_xlabel("optimiser step")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return charts[0]


def task_dots(name: str, title: str, tasks: Mapping[str, Mapping[str, Estimate]], unit: str) -> Chart:
    """A row per task: the value of every model with its interval, 0 to 1."""
    with drawn(name, title, 0.75 + 0.32 * len(tasks)) as (figure, charts):
        axes = figure.subplots()
        _draw_dots(axes, tasks, 100)
        axes.set(xlim=(-2, 102), xlabel=unit)
    return charts[0]


def time_dots(name: str, title: str, phases: Mapping[str, Mapping[str, Estimate]]) -> Chart:
    """A row per phase: the median of every model, in seconds, with the range of its samples; logarithmic."""
    with drawn(name, title, 0.75 + 0.32 * len(phases)) as (figure, charts):
        axes = figure.subplots()
        axes.set_xscale("log")
        _draw_dots(axes, phases, 1000)
        axes.set_xlabel("milliseconds (logarithmic)")
        _plain_logarithms(axes)
    return charts[0]


def speedup_dots(name: str, title: str, workloads: Mapping[str, Mapping[str, Estimate]]) -> Chart:
    """A row per workload: dense / slim of the phases with their intervals; left of the line slim is slower."""
    with drawn(name, title, 0.95 + 0.4 * len(workloads)) as (figure, charts):
        axes = figure.subplots()
        axes.axvline(1, color=QUIET, linewidth=0.9)
        _draw_dots(axes, workloads, 1)
        axes.set(xlabel="times as fast as dense", ylabel="workload")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        ends = [end for found in workloads.values() for one in found.values() for end in (one.low, one.high)]
        if max(ends) > WIDE_RATIOS * min(ends):
            axes.set_xscale("log")
            _plain_logarithms(axes)
    return charts[0]


def trade_dots(name: str, title: str, marks: Sequence[Mark], axis: str, bounds: Sequence[float] = ()) -> Chart:
    """Quality over cost (logarithmic), a mark per artefact; the best are joined and named, bounds of the cost lines."""
    with drawn(name, title, 2.6) as (figure, charts):
        axes = figure.subplots()
        axes.set_xscale("log")
        best = sorted((mark.cost, 100 * mark.quality.value) for mark in marks if mark.is_best)
        axes.plot([cost for cost, _ in best], [value for _, value in best], color=QUIET, linewidth=0.8, label="best")
        for kind in dict.fromkeys(mark.kind for mark in marks):
            chosen = [mark for mark in marks if mark.kind == kind]
            values = np.array([[one.quality.value, one.quality.low, one.quality.high] for one in chosen]).T * 100
            arms = np.array([values[0] - values[1], values[2] - values[0]]).clip(0)
            costs, marker, colour = [one.cost for one in chosen], MARKERS[kind], COLOURS[kind]
            axes.errorbar(
                *(costs, values[0], arms), linestyle="none", markersize=4, marker=marker, color=colour, label=kind
            )
        for mark in (one for one in marks if one.is_best):  # up and to the left of the line there is nothing
            text = axes.annotate(
                *(mark.label, (mark.cost, 100 * mark.quality.value), (-2, 3)), textcoords="offset points"
            )
            text.set(ha="right", va="bottom", rotation=-40, rotation_mode="anchor", fontsize=6, color=QUIET)
        axes.margins(x=0.1, y=0.16)
        for bound in bounds:
            axes.axvline(bound, color=CUT, linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"{axis} (logarithmic)", ylabel="quality, %")
        _plain_logarithms(axes)
        finish(axes, "y")
        legend(axes, 3)
    return charts[0]


def _draw_dots(axes: Axes, rows: Mapping[str, Mapping[str, Estimate]], times: float) -> None:
    """Estimates of every row by label, multiplied by `times`; a row need not have every label."""
    labels = list(dict.fromkeys(label for found in rows.values() for label in found))
    for place, label in enumerate(labels):
        chosen = [(row, found[label]) for row, found in enumerate(rows.values()) if label in found]
        values = [times * one.value for _, one in chosen]
        arms = np.array([[times * (one.value - one.low), times * (one.high - one.value)] for _, one in chosen])
        at = np.array([row for row, _ in chosen]) + 0.22 * (place - (len(labels) - 1) / 2)
        axes.errorbar(
            values, at, xerr=arms.T.clip(0), linestyle="none", markersize=3.5, elinewidth=0.9,
            marker=MARKERS[label], color=COLOURS[label], label=label,
        )  # fmt: skip
    _name_rows(axes, list(rows))
    finish(axes, "x")
    legend(axes, len(labels) if len(labels) <= 3 else 2)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _plain_logarithms(axes: Axes) -> None:
    """Numbers at 1 and 3 of every decade, at 1, 2 and 5 or at all digits where the axis is shorter."""
    low, high = axes.get_xlim()
    subs = (1.0, 3.0) if high > 100 * low else (1.0, 2.0, 5.0) if high > 8 * low else tuple(range(1, 10))
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_major_formatter(_plain)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_losses(axes: Axes, steps: Sequence[int], losses: Sequence[float]) -> None:
    """A line; with too many steps the mean of neighbours, and their range behind it."""
    if len(steps) <= POINTS:
        axes.plot(steps, losses, color=SLIM, marker="." if len(steps) < 2 else None)
        return
    parts = [np.array(part) for part in np.array_split(np.array([steps, losses], dtype=np.float64), POINTS, axis=1)]
    middles = [part[0].mean() for part in parts]
    axes.fill_between(middles, [p[1].min() for p in parts], [p[1].max() for p in parts], color=WHOLE, linewidth=0)
    axes.plot(middles, [part[1].mean() for part in parts], color=SLIM)


def _draw_validations(axes: Axes, curve: Curve) -> None:
    steps, scores = zip(*curve.validations, strict=True)
    axes.plot(steps, scores, color=DENSE, marker="o", markersize=3)
    best = [(step, score) for step, score in curve.validations if step == curve.best_step]
    axes.plot([step for step, _ in best], [score for _, score in best], "o", markersize=8, color=CUT, fillstyle="none")
    axes.set_ylabel("validation score")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))


def _number_stages(axes: Axes, stages: Sequence[tuple[int, int]]) -> None:
    """1, 2, 3 above the stages that are wide enough; the table has their names."""
    total = stages[-1][1] if stages else 0
    for number, (first, last) in enumerate(stages, start=1):
        if last - first + 1 >= 0.03 * total:
            place = (first + last) / 2
            axes.text(place, 1.02, str(number), transform=_across(axes), ha="center", va="bottom", color=QUIET)


def _across(axes: Axes) -> Transform:
    """Coordinates: x in steps, y from 0 (bottom) to 1 (top)."""
    return axes.get_xaxis_transform()


def _plain(value: float, _: object) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _short(name: str) -> str:
    text = shown(name)
    return text if len(text) <= TICK_LETTERS else text[: TICK_LETTERS - 1] + "…"


def finish(axes: Axes, grid: Literal["x", "y"]) -> None:
    """A grid across the figures, and short ticks."""
    axes.grid(axis=grid)
    axes.tick_params(length=2)


def legend(axes: Axes, columns: int) -> None:
    """Above the chart."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.6)


@contextmanager
def drawn(name: str, title: str, height: float) -> Iterator[tuple[Figure, list[Chart]]]:
    """A figure to draw in; the list holds the chart afterwards."""
    charts: list[Chart] = []
    with warnings.catch_warnings(), matplotlib.style.context(["default", STYLE | {"svg.hashsalt": name}]):
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's fonts draw the text, not ours
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, charts
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    charts.append(Chart(name, title, _element(file.getvalue(), name, title)))


def _element(document: bytes, name: str, title: str) -> str:
    """The SVG as an element of a page: no rules of its own, sized by the page, identifiers that no other chart has."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(document)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            value = re.sub(r"(?<=url\(#)|^#(?=[a-zA-Z])", lambda found: f"{found.group()}{name}-", value)
            element.set(key, re.sub(r"#00000([1-9])\b", lambda found: f"var(--{VARIABLES[int(found[1]) - 1]})", value))
    for key in ("width", "height"):
        root.attrib.pop(key)
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")
