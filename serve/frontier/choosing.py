"""Which points of a frontier are worth having: the Pareto line, and the best under a bound. No torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from slimvlm.serve.fitting.goals import QUANTITIES, Goal, read_goals
from slimvlm.serve.frontier.frontier import ACCEPTED_DROP, Frontier, Point

COSTS = {"size": "smallest", "tpot": "fastest per token", "ttft": "fastest to the first token"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A recommendation: `point` is None where nothing that was measured fits; `sentence` says it all."""

    point: Point | None
    sentence: str


def pareto(frontier: Frontier, cost: str) -> tuple[Point, ...]:
    """The points that no other one beats in quality and in `cost` (`size`, `tpot`, `ttft`), cheapest first."""
    line: list[Point] = []
    known = [(value, point) for point in frontier.points if (value := frontier.cost(point, cost)) is not None]
    for _, point in sorted(known, key=lambda one: (one[0], one[1].drop)):
        if not line or point.drop < line[-1].drop:
            line.append(point)
    return tuple(line)


def recommend(frontier: Frontier) -> tuple[Choice, ...]:
    """The smallest and the fastest artefact that lose at most a point, and the best one under each target."""
    within = f"at most {ACCEPTED_DROP:g} point lost"
    bounds = [_cheapest(frontier, cost, within) for cost in costs_of(frontier)]
    return (*bounds, *(_best(frontier, goal) for goal in read_goals(frontier.targets)))


def costs_of(frontier: Frontier) -> tuple[str, ...]:
    """What its points cost: bytes, and where they were timed the time that counts, a token's or a tower's."""
    times = (phase for phase in ("tpot", "vision") if any(point.milliseconds(phase) for point in frontier.points))
    return ("size", *itertools.islice(times, 1))


def _cheapest(frontier: Frontier, cost: str, within: str) -> Choice:
    """Of the points that lose at most ACCEPTED_DROP."""
    good = _good(frontier, cost)
    what = COSTS.get(cost, f"lowest {cost}").capitalize()
    if not good:
        return Choice(None, f"{what} with {within}: none of the points that were measured.")
    value, point = min(good, key=lambda one: (one[0], one[1].drop))
    return Choice(point, f"{what} with {within}: {_words(point, cost, value)}{_beside(frontier, point, cost)}.")


def _best(frontier: Frontier, goal: Goal) -> Choice:
    """Of the points that meet a target: the one that loses least; of a bound on the loss: the smallest."""
    if goal.name == "drop":
        fits = [one for one in frontier.points if goal.is_met(max(one.drop, 0.0))]
        key = "size"
    else:
        kind = frontier.device.kind
        found = {"memory": lambda one: one.memory(kind)}.get(goal.name, lambda one: frontier.cost(one, goal.name))
        known = [(value, one) for one in frontier.points if (value := found(one)) is not None]
        if not known:
            return Choice(None, f"Best under {goal}: it was not measured.")
        fits, key = [one for value, one in known if goal.is_met(value)], goal.name
    if not fits:
        return Choice(None, f"Best under {goal}: none of the points that were measured meets it.")
    point = min(fits, key=lambda one: (one.bytes, one.drop) if goal.name == "drop" else (one.drop, one.bytes))
    return Choice(point, f"Best under {goal}: {_words(point, key, frontier.cost(point, key))}.")


def _words(point: Point, cost: str, value: float | None) -> str:
    """`49.9 % removed, q4, 1.7 MB, 0.8 (0.2 to 1.4) points lost`."""
    figures = [QUANTITIES[cost].words(value)] if value is not None and cost in QUANTITIES else []
    return ", ".join((point.name, *figures, f"{point.lost} points lost"))


def _beside(frontier: Frontier, point: Point, cost: str) -> str:
    """What the best dense variant costs that loses as little, where the point is a cut; else that no cut was better."""
    rivals = [(value, one) for value, one in _good(frontier, cost) if one.is_dense]
    if point.is_dense:
        return "; no cut that was measured is better" if len(rivals) < len(frontier.points) else ""
    if not rivals:
        return "; no dense variant loses so little"
    value, rival = min(rivals, key=lambda one: one[0])
    one, other = point.faster(cost), rival.faster(cost)
    level = one is not None and other is not None and one.low <= other.high and other.low <= one.high
    doubt = ", which its interval does not tell from it" if level else ""
    return f"; the best dense one is {rival.name}, {QUANTITIES[cost].words(value)}{doubt}"


def _good(frontier: Frontier, cost: str) -> list[tuple[float, Point]]:
    """The points that lose at most ACCEPTED_DROP, with what they cost."""
    costs = ((frontier.cost(point, cost), point) for point in frontier.points if point.drop <= ACCEPTED_DROP)
    return [(value, point) for value, point in costs if value is not None]
