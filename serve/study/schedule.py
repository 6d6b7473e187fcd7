"""In which order cells are measured, and how long what is left will take. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import mean

from slimvlm.serve.frontier.schedule import informative_order
from slimvlm.serve.study.study import Cell, Row

LIKENESSES: tuple[Callable[[dict[str, object]], object], ...] = (  # of what takes as long, the nearest first
    lambda said: [said.get(name) for name in ("criterion", "rounds", "compensation", "recover", "steps", "train")],
    lambda said: [said.get(name) for name in ("rounds", "recover", "steps")],
    lambda said: [said.get(name) for name in ("recover", "steps")],
)


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Set by set, so that an unfinished study has whole rows; in a row the most telling ratios first."""
    cells = list(cells)
    order = {ratio: place for place, ratio in enumerate(informative_order([cell.options.ratio for cell in cells]))}
    seeds = list(dict.fromkeys(cell.options.seed for cell in cells))
    methods = list(dict.fromkeys((cell.bed.name, cell.method) for cell in cells))
    return sorted(
        cells,
        key=lambda one: (
            seeds.index(one.options.seed),
            methods.index((one.bed.name, one.method)),
            order[one.options.ratio],
        ),
    )


def seconds_left(missing: Sequence[Cell], rows: Sequence[Row]) -> float | None:
    """Of one process: as long as what is alike took, else as the study's file expects; None where neither is known."""
    cut = [row for row in rows if not row.is_base and "spent" in row.seconds]
    plans = Counter(_plan(cell) for cell in missing)
    expected = [_measured_seconds(cell, cut) or expected_seconds(cell, plans[_plan(cell)]) for cell in missing]
    known = [one for one in expected if one is not None]
    return sum(known) * len(expected) / len(known) if known else None if expected else 0.0


def _measured_seconds(cell: Cell, rows: Sequence[Row]) -> float | None:
    for likeness in LIKENESSES:
        alike = [
            row.seconds["spent"]
            for row in rows
            if row.bed == cell.bed.name and likeness(dict(row.options)) == likeness(dict(cell.said))
        ]
        if alike:
            return mean(alike)
    return None


def expected_seconds(cell: Cell, sharing: int = 1) -> float | None:
    """By what the bed says of itself: seconds to `evaluate` and to `cut` a model once, of a `round` of planning and of
    a `step` of training; None where it says nothing.

    Args:
        sharing: cells that are cut by one plan.
    """
    told, said = cell.bed.seconds, cell.options
    if not told:
        return None
    training = said.steps if said.recover != "none" and said.steps else 0
    counts = {"evaluate": 1, "cut": 1, "round": said.rounds / sharing, "step": training}
    return sum(count * told.get(name, 0.0) for name, count in counts.items())


def _plan(cell: Cell) -> str:
    """The same for cells that are cut by one plan."""
    return f"{cell.bed.name} {replace(cell.options, ratio=cell.largest).identity()}"
