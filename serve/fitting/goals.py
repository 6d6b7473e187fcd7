"""What a device allows, and what may be lost: the targets of `--target NAME=AMOUNT` by name. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slimvlm.compress.errors import UnsuitableOptionError

# 8GB, 8gb, 8G and 8GiB; G is 1000^3, GiB is 1024^3.
BYTES = {"": 1.0, "B": 1.0} | {
    prefix + suffix: float(base**power)
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}
MILLISECONDS = {"US": 1e-3, "MS": 1.0, "S": 1e3}
POINTS = {"": 1.0}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([a-z]*)", re.IGNORECASE)
DROP = "drop"
WITHIN = 0.03  # a time or a peak that was measured is met within 3 %


@dataclass(frozen=True, slots=True)
class Quantity:
    """A row.

    Attributes:
        meaning: what is held to the target.
        units: unit in capitals -> how many of what figures are kept in: bytes, parameters, milliseconds, points.
        example: an amount, as it can be written.
        slack: by what share of itself a target is exceeded while it still counts as met.
    """

    name: str
    meaning: str
    units: Mapping[str, float]
    example: str
    slack: float = 0.0

    def words(self, value: float) -> str:
        """A figure for people: 3.6 MB, 1.26 M parameters, 4.21 ms, 0.8 points."""
        if self.units is MILLISECONDS:
            return f"{value:.3g} ms"
        if self.units is POINTS:
            return f"{round(value, 2) + 0.0:.2g} points"
        scale, prefix = next(((1000**n, p) for n, p in ((3, "G"), (2, "M"), (1, "k")) if value >= 1000**n), (1, ""))
        return f"{value / scale:.3g} {prefix}B" if self.units is BYTES else f"{value / scale:.3g}{prefix} parameters"


QUANTITIES: Mapping[str, Quantity] = {
    row.name: row
    for row in (
        Quantity("size", "bytes of the weights and graphs on disk", BYTES, "3MB"),
        Quantity("memory", "peak memory of a process that runs it", BYTES, "500MB", WITHIN),
        Quantity("params", "parameters, tied ones once", COUNTS, "1.2M"),
        Quantity("vision", "time from pixels to features", MILLISECONDS, "20ms", WITHIN),
        Quantity("ttft", "time to the first token", MILLISECONDS, "200ms", WITHIN),
        Quantity("tpot", "time of one later token", MILLISECONDS, "15ms", WITHIN),
        Quantity(DROP, "points of quality that may be lost", POINTS, "1.0"),
    )
}


@dataclass(frozen=True, slots=True)
class Goal:
    """At most `amount` of the quantity `name`, one of QUANTITIES, in what its figures are kept in."""

    name: str
    amount: float

    @property
    def quantity(self) -> Quantity:
        """Its row."""
        return QUANTITIES[self.name]

    def excess(self, value: float) -> float:
        """The figure as a share of the target: above 1 it is missed."""
        return value / self.amount

    def is_met(self, value: float) -> bool:
        """Whether a figure meets the target, within what its quantity allows."""
        return self.excess(value) <= 1 + self.quantity.slack

    def __str__(self) -> str:
        return f"{self.name} {self.quantity.words(self.amount)}"


def split_goals(goals: Iterable[Goal]) -> tuple[tuple[Goal, ...], Goal | None]:
    """The goals of cost, and the bound on the loss where there is one."""
    goals = tuple(goals)
    return tuple(goal for goal in goals if goal.name != DROP), next((goal for goal in goals if goal.name == DROP), None)


def read_goals(targets: Iterable[str]) -> tuple[Goal, ...]:
    """The goals of `NAME=AMOUNT`s.

    Raises:
        UnsuitableOptionError: an unknown name or unit, no amount above 0, or two targets of one name.
    """
    goals: dict[str, Goal] = {}
    for target in targets:
        name, _, amount = (part.strip() for part in target.partition("="))
        if name not in QUANTITIES:
            known = ", ".join(f"{row.name}={row.example}" for row in QUANTITIES.values())
            raise UnsuitableOptionError(f"--target {target[:60]!r} is unknown; write one as {known}")
        if name in goals:
            raise UnsuitableOptionError(f"--target {name} is given twice; give the smaller amount alone")
        goals[name] = Goal(name, _amount(QUANTITIES[name], target, amount))
    return tuple(goals.values())


def _amount(quantity: Quantity, target: str, text: str) -> float:
    found = AMOUNT.fullmatch(text) if len(text) < 40 else None
    scale = quantity.units.get(found.group(2).upper()) if found else None
    amount = float(found.group(1)) * scale if found and scale else 0.0
    if not 0 < amount < math.inf:
        units = ", ".join(unit.lower() for unit in quantity.units if unit) or "none"
        raise UnsuitableOptionError(
            f"--target {target[:60]!r} is no amount above 0 of a known unit ({units}); write it as "
            f"{quantity.name}={quantity.example}"
        )
    return amount
