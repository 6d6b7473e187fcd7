"""The Frontier: what a model can do, over what it costs, for many cuts and precisions on one device. JSON; no torch.

A *point* is one artefact: a cut (or the dense model) in one variant. Its quality is compared with the dense model's in
full precision on the same questions, its times are measured beside those of that model, in turns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from slimvlm.compress.evaluation.quality import Comparison
from slimvlm.export.variants import FULL, VARIANTS
from slimvlm.serve.judging.limits import peak_memory
from slimvlm.serve.profile import MEASURED, Cell, Device, Ratio

SCHEMA = 1
ACCEPTED_DROP = 1.0  # points: what "as good as dense" means in the sentences


@dataclass(frozen=True, slots=True)
class Point:
    """One artefact and what was measured of it.

    Attributes:
        ratio: that was asked for; 0: the dense model.
        removed: fraction of all parameters that is gone.
        variant: one of VARIANTS.
        folder: of its graphs, relative to the frontier's.
        bytes: of the files that are needed to run it.
        quality: it (`slim`) against the dense model in full precision (`dense`).
        cell: it (`slim`) beside the dense model in full precision (`dense`); of that model itself it holds it alone.
            None where it was not timed.
        seconds: that making and measuring it took.
    """

    ratio: float
    removed: float
    variant: str
    folder: str
    bytes: int
    quality: Comparison
    cell: Cell | None
    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1 or not 0 <= self.removed < 1 or self.variant not in VARIANTS or self.bytes < 1:
            raise ValueError(f"point: ratio {self.ratio}, removed {self.removed}, {self.variant!r}, {self.bytes} bytes")

    @property
    def is_dense(self) -> bool:
        return self.ratio == 0

    @property
    def name(self) -> str:
        """For people: `dense int8`, `35 % removed, q4`."""
        return point_name(self.removed, self.variant)

    @property
    def drop(self) -> float:
        """Points of quality it loses."""
        return 100 * self.quality.drop

    @property
    def lost(self) -> str:
        """The same for people, with its interval: `0.8 (0.3 to 1.3)`."""
        sign = self.quality.drop / self.quality.difference if self.quality.difference else -1.0
        low, high = sorted(sign * 100 * end for end in (self.quality.low, self.quality.high))
        value, low, high = (round(one, 1) + 0.0 for one in (self.drop, low, high))  # no -0.0
        return f"{value:.1f} ({low:.1f} to {high:.1f})"

    def milliseconds(self, phase: str, model: str = "slim") -> float | None:
        """Median of a phase of `profile.PHASES`, of the artefact or of `dense`, in turns with it; None: not timed."""
        run = self.cell.runs.get(model) if self.cell is not None and self.cell.status == MEASURED else None
        return 1000 * run.medians[phase] if run is not None and phase in run.medians else None

    def faster(self, phase: str) -> Ratio | None:
        """How many times as fast it is as the dense model in full precision, timed in turns; None where it was not."""
        return None if self.cell is None else self.cell.ratios.get(phase)

    def memory(self, kind: str) -> int | None:
        """Bytes at the peak on a device of this kind."""
        run = None if self.cell is None else self.cell.runs.get("slim")
        return None if run is None else peak_memory(run.memory, kind)


@dataclass(frozen=True, slots=True)
class Frontier:
    """All points that were measured, in that order.

    Attributes:
        source: the model as it was given; `digest`: of its weights.
        settings: options that say how points were made and measured.
        skipped: points that could not be made or measured, and why.
        left: points there was no time for.
        targets: as they were given (`size=3MB`).
    """

    source: str
    family: str
    digest: str
    device: Device
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    points: tuple[Point, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Indented JSON.

        Raises:
            ValueError: a figure is not finite.
        """
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    def cost(self, point: Point, name: str) -> float | None:
        """A figure by the name that targets have for it: size (bytes); ttft, tpot, vision (milliseconds).

        A device is not as fast in one minute as in another. So a time is that of the dense model over the whole
        measurement, by how many times as fast the point was in turns with it.
        """
        if name == "size":
            return float(point.bytes)
        usual, faster = self._usual(name), point.faster(name)
        if usual is None:
            return point.milliseconds(name)
        if faster is not None:
            return usual / faster.value
        return usual if point.is_dense and point.variant == FULL else point.milliseconds(name)

    def _usual(self, phase: str) -> float | None:
        """Median of all times of the dense model in full precision; None where nothing was timed in turns with it."""
        found = [point.milliseconds(phase, "dense") for point in self.points if point.faster(phase) is not None]
        return median(times) if (times := [time for time in found if time is not None]) else None

    def find(self, ratio: float, variant: str) -> Point | None:
        """This point, if it was measured."""
        return next((point for point in self.points if (point.ratio, point.variant) == (ratio, variant)), None)

    def with_point(self, point: Point) -> Frontier:
        """The same with this point, in the place of what it was measured as before."""
        place = self.find(point.ratio, point.variant)
        if place is None:
            return replace(self, points=(*self.points, point))
        return replace(self, points=tuple(point if one is place else one for one in self.points))


def point_name(removed: float, variant: str) -> str:
    """An artefact for people: `dense int8`, `35 % removed, q4`."""
    return f"{100 * removed:.3g} % removed, {variant}" if removed else f"dense {variant}"
