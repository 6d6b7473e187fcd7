"""What slimvlm itself measured: the packaged `figures.json`, a line per method, ratio and model. No torch.

`python benchmarks/figures.py` writes it from results of `slimvlm study`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from slimvlm.compress.files.decoding import decode, parse

FILE = "figures.json"
OWN = "slimvlm default"  # what the row of our defaults is called
SHOWN = 3  # best ones, besides our default


@dataclass(frozen=True, slots=True)
class Figure:
    """One method on one model at one ratio (of ALL parameters): mean and range over sets.

    Attributes:
        recovered: it was trained after the cut.
        score, low, high: the figure to quote, 0 to 1; `kept`: the chance-corrected share of the dense model.
        sets: calibration sets.
        source: the results file, and which questions.
    """

    bed: str
    method: str
    ratio: float
    recovered: bool
    score: float
    low: float
    high: float
    kept: float
    sets: int
    source: str


@cache
def figures() -> tuple[Figure, ...]:
    """All of them."""
    return decode(parse(files(__package__).joinpath(FILE).read_bytes()), tuple[Figure, ...])


def beside(ratio: float, recovered: bool, known: Sequence[Figure] | None = None) -> list[Figure]:
    """Those to hold against an advice: of every model, at its ratio nearest to `ratio`, our default and the best."""
    chosen: list[Figure] = []
    found = [one for one in (figures() if known is None else known) if one.recovered == recovered]
    for bed in dict.fromkeys(one.bed for one in found):
        mine = [one for one in found if one.bed == bed]
        near = min((one.ratio for one in mine), key=lambda one: abs(one - ratio))
        ranked = sorted((one for one in mine if one.ratio == near), key=lambda one: -one.kept)
        own = [one for one in ranked if one.method == OWN]
        chosen += [*own, *[one for one in ranked if one.method != OWN][:SHOWN]]
    return chosen
