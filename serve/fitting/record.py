"""`fit.json`: what was asked of a device, what was tried for it, and what is delivered. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimvlm.serve.fitting.goals import QUANTITIES, Goal

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
        known = ((name, value) for name, value in self.figures.items() if name in QUANTITIES)
        return ", ".join(f"{name} {QUANTITIES[name].words(value)}" for name, value in known)

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
        asked = " and ".join(map(str, self.goals))
        if self.chosen.is_whole:
            first = f"No pruning needed: the whole model in {self.chosen.backend} meets {asked} ({self.chosen.words})."
        else:
            first = (
                f"{self.chosen.ratio:.1%} of the parameters removed, in {self.chosen.backend}, meets {asked} "
                f"({self.chosen.words})."
            )
        whole = [trial for trial in self.trials if trial.is_whole and trial is not self.chosen]
        others = [f"{one.backend} ({one.words})" for one in whole if one != self.chosen]
        missed = f" Whole it misses that in {'; in '.join(others)}." if others else ""
        return [f"{first}{missed}", f"{len(self.trials)} candidates were made and measured on this device."]
