"""What a run comes to at a glance: size, quality, times and memory, before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from slimvlm.compress.runs import PLAN, PROFILE, QUALITY
from slimvlm.serve.fitting.goals import QUANTITIES
from slimvlm.serve.profile import FASTER, SLOWER, TOO_NOISY
from slimvlm.serve.report.document import Card, change, percent, points, shown
from slimvlm.serve.report.files import RunFiles
from slimvlm.serve.report.sections.quality import verdict
from slimvlm.serve.report.sections.running import GROWN, first_of_backends, peaks
from slimvlm.serve.report.sections.running_tables import Numbered

NONE = "not measured"
CERTAIN = {FASTER: True, SLOWER: False}  # whether a verdict is good news; of the others none knows


def cards_of(files: RunFiles) -> tuple[Card, ...]:
    """One card per row of CARDS; what was not measured says so."""
    return tuple(make(title, files) for title, make in CARDS.items())


def _size(title: str, files: RunFiles) -> Card:
    if (plan := files.plan) is None:
        return Card(title, "", NONE, "the stage plan is not finished", PLAN)
    counts = plan.parameters_before, plan.parameters_after
    before, after = (QUANTITIES["params"].words(count).removesuffix(" parameters") for count in counts)
    note = f"{change(*counts)}, parameters"
    smaller = plan.parameters_after < plan.parameters_before or None
    return Card(title, before, after, note, f"{PLAN}: parameters_before, parameters_after", smaller)


def _quality(title: str, files: RunFiles) -> Card:
    if files.quality is None:
        return Card(title, "", NONE, "the stage evaluate is not finished", QUALITY)
    found = files.quality.comparison
    certain = {"better": True, "worse": False}.get(verdict(found))
    said = "" if certain is not None else ", within chance"
    note = f"{points(found.difference)} points, mean of tasks{said}"
    return Card(title, percent(found.dense), percent(found.slim), note, f"{QUALITY}: comparison", certain)


def _time(title: str, files: RunFiles, phase: str) -> Card:
    for one in _measured(files):
        if (ratio := one.cell.ratios.get(phase)) is not None:
            before, after = (QUANTITIES[phase].words(1000 * seconds) for seconds in (ratio.dense, ratio.slim))
            unsure = {TOO_NOISY: ", too noisy to tell"}.get(ratio.verdict, "")
            note = f"{ratio.value:.2f} times as fast{unsure}, {_where(one)}"
            source = f"{PROFILE}: cells[{one.number - 1}].ratios.{phase}"
            return Card(title, before, after, note, source, CERTAIN.get(ratio.verdict))
    return Card(title, "", NONE, "no profile of both models", PROFILE)


def _memory(title: str, files: RunFiles) -> Card:
    for one in _measured(files):
        held = {model: peak for model, (_, peak) in peaks(one).items()}
        if {"dense", "slim"} <= held.keys():
            dense, slim = held["dense"], held["slim"]
            before, after = (QUANTITIES["memory"].words(peak) for peak in (dense, slim))
            certain = False if slim > (1 + GROWN) * dense else True if slim < (1 - GROWN) * dense else None
            source = f"{PROFILE}: cells[{one.number - 1}].runs.*.memory"
            return Card(title, before, after, f"{change(dense, slim)}, {_where(one)}", source, certain)
    return Card(title, "", NONE, "no profile of both models", PROFILE)


def _measured(files: RunFiles) -> Iterator[Numbered]:
    """The first workload of every backend, torch's first: the one that both models surely ran."""
    cells = files.profile.cells if files.profile else ()
    return iter(first_of_backends([Numbered(number, cell) for number, cell in enumerate(cells, start=1)]))


def _where(one: Numbered) -> str:
    return shown(f"{one.cell.backend}, batch {one.cell.batch_size}")


CARDS: dict[str, Callable[[str, RunFiles], Card]] = {
    "Size": _size,
    "Quality": _quality,
    "First token": partial(_time, phase="ttft"),
    "Per token": partial(_time, phase="tpot"),
    "Peak memory": _memory,
}
