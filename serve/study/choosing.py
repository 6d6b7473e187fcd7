"""What the rows of a study say together: a figure per method, bed and ratio over all sets, and the best. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from slimvlm.serve.study.study import MEASURED, VAL, Row

CHOSEN_BY = ("val", "val-loss")


@dataclass(frozen=True, slots=True)
class Range:
    """Mean and extremes over sets."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Range | None:
        """None without a value."""
        found = list(values)
        return cls(mean(found), min(found), max(found)) if found else None


@dataclass(frozen=True, slots=True)
class Summary:
    """All sets of one method on one bed at one ratio, on one split."""

    bed: str
    method: str
    ratio: float
    split: str
    rows: tuple[Row, ...]

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows that have figures."""
        return tuple(row for row in self.rows if row.status == MEASURED)

    def over(self, figure: Callable[[Row], float | None]) -> Range | None:
        """A figure over the measured sets."""
        return Range.of(value for row in self.measured if (value := figure(row)) is not None)

    @property
    def score(self) -> Range | None:
        """The figure to quote, 0 to 1."""
        return self.over(lambda row: row.score)

    @property
    def kept(self) -> Range | None:
        """The chance-corrected share."""
        return self.over(lambda row: row.kept)

    @property
    def planning(self) -> Range | None:
        """Seconds of a plan."""
        return self.over(lambda row: row.seconds.get("plan"))

    @property
    def removed(self) -> Range | None:
        """Fraction of all parameters, of what missed its ratio too."""
        return Range.of(row.removed for row in self.rows if row.removed is not None)


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Of all cuts, in the order of the rows."""
    found: dict[tuple[str, str, float, str], list[Row]] = {}
    for row in rows:
        if not row.is_base:
            found.setdefault((row.bed, row.method, row.ratio, row.split), []).append(row)
    return [Summary(*key, tuple(rows)) for key, rows in found.items()]


def best(rows: Sequence[Row], chosen_by: str = CHOSEN_BY[0]) -> list[Summary]:
    """The best method of each bed and ratio on validation questions, of those that have as many sets as any has.

    Args:
        chosen_by: one of CHOSEN_BY: the score, or the loss of the right answers' tokens.
    """
    value: dict[str, Callable[[Row], float | None]] = {
        "val": lambda row: row.score,
        "val-loss": lambda row: None if row.token_loss is None else -row.token_loss,
    }
    groups: dict[tuple[str, float], list[tuple[int, float, Summary]]] = {}
    for one in summaries(rows):
        if one.split == VAL and (found := one.over(value[chosen_by])):
            groups.setdefault((one.bed, one.ratio), []).append((len(one.measured), found.mean, one))
    return [max(group, key=lambda one: one[:2])[2] for group in groups.values()]
