"""Charts of a study: what many methods keep, over what they remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slimvlm.serve.report.charts import CUT, DENSE, INK, SLIM, Estimate, drawn, finish, legend
from slimvlm.serve.report.document import Chart, shown

LINES = tuple((colour, dash) for dash in ("-", "--") for colour in (SLIM, CUT, INK, DENSE))  # more cannot be told apart
MARKS = "os^Dvx+*"
LONGEST_LABEL = 48  # letters


def range_lines(name: str, title: str, lines: Mapping[str, Sequence[tuple[float, Estimate]]], axis: str) -> Chart:
    """A line per method, at most as many as LINES: values (0 to 1) with their ranges, over a fraction."""
    with drawn(name, title, 2.6 + 0.14 * len(lines)) as (figure, charts):
        axes = figure.subplots()
        for (label, points), (colour, dash), mark in zip(lines.items(), LINES, MARKS, strict=False):
            values = 100 * np.array([[one.value, one.low, one.high] for _, one in points]).T
            arms = np.array([values[0] - values[1], values[2] - values[0]]).clip(0)
            axes.errorbar(
                [100 * place for place, _ in points], values[0], arms, color=colour, linestyle=dash, marker=mark,
                markersize=3.5, elinewidth=0.9, label=shown(label)[:LONGEST_LABEL],
            )  # fmt: skip
        axes.set(xlabel=axis, ylabel="quality, %")
        finish(axes, "y")
        legend(axes, 1)
    return charts[0]
