"""What a study is made of: beds (a model with its samples), cells (one way to make one cut), rows (what they gave).

No torch: the command line makes the cells, and the report reads the rows.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any  # values of options of all types, as JSON has them

from slimvlm.compress.errors import OutputError
from slimvlm.compress.files.decoding import MisfitError, decode, dump, parse, refused_as
from slimvlm.compress.files.lines import read_lines
from slimvlm.compress.options import NOT_IDENTITY, CutOptions, SparsifyOptions
from slimvlm.compress.runs import AGAIN

RESULTS = "results.jsonl"
MEASURED, MISSED, FAILED = "measured", "missed", "failed"
DENSE, BLIND = "dense", "blind"  # methods that cut nothing
VAL, TEST = "val", "test"
ACCEPTED_MISS = 0.002  # of all parameters: a cut that is farther off its ratio is compared with no other
WHERE = ("model", "data", "eval_data")  # options that a bed says
UNSAID = CutOptions(model="", data=Path(), out=Path())  # what an option that nobody gave is


@dataclass(frozen=True, slots=True)
class Bed:
    """A model with the samples it is cut with (`data`), chosen by (`val`) and, for chosen rows, reported on (`test`).

    Attributes:
        options: how it is computed with, and how many questions it is asked: fields of CutOptions.
        seconds: what things take, where that is known beforehand; see `schedule.expected_seconds`.
    """

    name: str
    model: str
    data: Path
    val: Path
    test: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cut of one model, made in one way with one set of samples (drawn by the seed).

    Attributes:
        method: what the row it belongs to is called; it has all ratios and seeds.
        options: all of them, ratio and seed too.
        largest: the ratio of the plan it is cut by; above its own where all ratios of a row are cut by one plan.
        said: the options as they are written down: those of the plan, of the cut, and of the recovery where there is
            one.
        zeros: single weights become zero instead of a cut; `options` say with which samples and questions.
    """

    bed: Bed
    method: str
    options: CutOptions
    largest: float
    said: Mapping[str, Any]
    zeros: SparsifyOptions | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.bed.name}, {self.method}, {100 * self.options.ratio:g} %, set {self.options.seed}"

    @property
    def key(self) -> str:
        """Of its folder: what it is in short, and a digest of all of it."""
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.bed.name} {self.method}".lower()).strip("-")[:60]
        return f"{words}-{self.options.ratio:g}-{self.options.seed}-{digest(self.bed.name, self.said)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of a cell, or of the dense model seeing and blind: a line of `results.jsonl`.

    Attributes:
        set: the seed that drew the samples.
        options: `Cell.said`, or what the dense model and the questions are.
        status: MEASURED; MISSED: it removes another share than was asked for, and was not evaluated; FAILED.
        removed: fraction of all parameters that is gone, or zero.
        score: the figure to quote (0 to 1); `kept`: 0 for the blind model, 1 for the dense one.
        seconds: of the `plan`, the `cut`, the `recovery`, the `evaluation`; `spent`: of all that this cell took, its
            part of what it shares with others too.
        training: what the recovery says of itself.
        reason: why it failed.
    """

    bed: str
    method: str
    ratio: float
    set: int
    split: str
    status: str
    options: Mapping[str, Any]
    removed: float | None = None
    questions: int = 0
    score: float | None = None
    kept: float | None = None
    token_loss: float | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_base(self) -> bool:
        """Whether nothing was cut."""
        return self.method in (DENSE, BLIND)

    def to_line(self) -> str:
        """As it is written."""
        return dump(asdict(self))

    def is_of(self, cell: Cell) -> bool:
        """Whether it says what this cell gave: options that its version did not know were what they are unsaid."""
        names = self.options.keys() | cell.said.keys()
        return all(self.options.get(name, _unsaid(name)) == cell.said.get(name, _unsaid(name)) for name in names)


def _unsaid(name: str) -> Any:
    return parse(dump(getattr(UNSAID, name, None)))


def said_of(options: CutOptions, largest: float, folder: Path) -> dict[str, Any]:
    """The options as they are written down; paths as seen from `folder`, where the study's file is."""
    said = {name: value for name, value in options.identity().items() if name not in WHERE}
    if options.recover != "none":
        said |= options.recovery_identity()
        for name in ("recover_data", "teacher"):
            if said[name] is not None and Path(said[name]).exists():
                said[name] = Path(os.path.relpath(said[name], folder)).as_posix()
    else:
        said["recover"] = "none"
    return dict(parse(dump({**said, "largest": largest})))


def said_of_zeros(options: SparsifyOptions) -> dict[str, Any]:
    """As `said_of`, of a model whose single weights become zero."""
    apart = {*WHERE, *NOT_IDENTITY}
    return dict(parse(dump({name: value for name, value in vars(options).items() if name not in apart})))


def digest(*parts: Any) -> str:
    """Of what is JSON: twelve letters."""
    return hashlib.sha256(dump(parts, sort_keys=True).encode()).hexdigest()[:12]


def read_rows(folder: Path) -> list[Row]:
    """The rows that were written so far; none where there is no file.

    Raises:
        OutputError: a line is none of ours.
    """
    return rows_in(folder / RESULTS)


def rows_in(path: Path) -> list[Row]:
    """The rows of a results file, as `read_rows`."""
    rows = []
    with refused_as(path, OutputError, f"mend or remove it; {AGAIN}"):
        for number, line in enumerate(read_lines(path), start=1):
            try:
                rows.append(decode(parse(line), Row))
            except MisfitError as error:
                raise error.inside(f"line {number}") from None
    return rows


def failed(cell: Cell, split: str, reason: str) -> Row:
    """The row of a cell that gave nothing."""
    return Row(
        bed=cell.bed.name, method=cell.method, ratio=cell.options.ratio, set=cell.options.seed, split=split,
        status=FAILED, options=cell.said, reason=reason,
    )  # fmt: skip


def missing(cells: Iterable[Cell], split: str, rows: Sequence[Row]) -> list[Cell]:
    """The cells without a row."""
    found: dict[tuple[str, float, int], list[Row]] = {}
    for row in rows:
        if row.split == split and not row.is_base:
            found.setdefault((row.bed, row.ratio, row.set), []).append(row)
    keys = ((cell, (cell.bed.name, cell.options.ratio, cell.options.seed)) for cell in cells)
    return [cell for cell, key in keys if not any(row.is_of(cell) for row in found.get(key, ()))]


def base_of(rows: Iterable[Row], bed: str, split: str, method: str = DENSE) -> Row | None:
    """The row of the dense model, seeing or blind."""
    return next((row for row in rows if (row.bed, row.split, row.method) == (bed, split, method)), None)


def kept_share(score: float, rows: Sequence[Row], bed: str, split: str) -> float | None:
    """Of what the dense model has over the blind one; None where the blind one is as good, or unknown."""
    dense, blind = (base_of(rows, bed, split, method) for method in (DENSE, BLIND))
    if dense is None or blind is None or not (dense.score or 0.0) > (blind.score or 0.0):
        return None
    return (score - (blind.score or 0.0)) / ((dense.score or 0.0) - (blind.score or 0.0))
