"""`fit.json`: what was asked of a device, what was tried for it, and what is delivered. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimvlm.serve.fitting.goals import DROP, QUANTITIES, Goal, split_goals

SCHEMA = 1

Figures = Mapping[str, float]  # quantity -> bytes, parameters, milliseconds


@dataclass(frozen=True, slots=True)
class Trial:
    """What one candidate was found to cost.

    Attributes:
        ratio: that its plan was made for.
        backend: what runs it, in which precision: `onnx:int8`.
        figures: by the names of `goals.QUANTITIES`, as far as they were asked for and there are any.
        spread: phase -> how far the starts of its process lie apart, half of it, as a share of the time.
    """

    ratio: float
    backend: str
    figures: Figures
    spread: Mapping[str, float] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """Its figures for people."""
        known = ((name, value) for name, value in self.figures.items() if name in QUANTITIES and name != DROP)
        costs = [f"{name} {QUANTITIES[name].words(value)}" for name, value in known]
        if DROP in self.figures:
            lost = self.figures[DROP]
            costs.append(f"{QUANTITIES[DROP].words(abs(lost))} {'gained' if lost < 0 else 'lost'}")
        return ", ".join(costs)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was cut for it."""
        return self.ratio == 0


@dataclass(frozen=True, slots=True)
class Fit:
    """The whole file.

    Attributes:
        model_digest, data_digest: of the plan that candidates are the beginnings of.
        device: that they were tried on, and its threads.
        trials: in the order in which they were tried.
        chosen: the one to deliver; None while it is looked for, and where there is none.
    """

    model_digest: str
    data_digest: str
    device: str
    goals: tuple[Goal, ...]
    trials: tuple[Trial, ...] = ()
    chosen: Trial | None = None
    schema: int = SCHEMA

    @property
    def sentences(self) -> list[str]:
        """What was found, in two or three sentences."""
        if self.chosen is None:
            return []
        costs, bound = split_goals(self.goals)
        asked, found = " and ".join(map(str, costs)), self.chosen
        removed = f"{found.ratio:.1%} of the parameters removed, in {found.backend}"
        if costs and found.is_whole:
            first = f"No pruning needed: the whole model in {found.backend} meets {asked} ({found.words})."
        elif costs:
            first = f"{removed}, meets {asked} ({found.words})."
        else:
            most = bound.quantity.words(bound.amount) if bound else ""
            best = f"The whole model in {found.backend}" if found.is_whole else f"{removed},"
            first = (
                f"{best} is the smallest that was found to lose at most {most}, before any training ({found.words})."
            )
        whole = [trial for trial in self.trials if trial.is_whole and trial != found]
        others = "; ".join(f"{one.backend} ({one.words})" for one in whole)
        missed = "Whole it misses that in" if costs else "Whole there are"
        second = f" {missed} {others}." if others else ""
        return [f"{first}{second}", f"{len(self.trials)} candidates were made and measured on this device."]
