"""Everything `slimvlm study` can be told, as data. No torch: the command line reads its defaults from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.serve.study.choosing import CHOSEN_BY
from slimvlm.serve.study.schedule import seconds_left
from slimvlm.serve.study.study import MEASURED, VAL, Bed, Cell, missing, read_rows

BEST = "best"


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of a study.

    Attributes:
        out: the folder of `results.jsonl`, and of what is needed to go on.
        cells: all there are, in the order they were written down.
        processes: that measure side by side; each has its part of the cores.
        retry: measure again what failed or missed its ratio.
        keep_models: leave the cut models in the folder.
        best_by: what the best method of every bed and ratio is chosen by: one of CHOSEN_BY.
        report_test: methods that are measured on the test questions too; `best`: those that are chosen.
    """

    out: Path
    cells: Sequence[Cell]
    processes: int = 1
    retry: bool = False
    keep_models: bool = False
    best_by: str = CHOSEN_BY[0]
    report_test: tuple[str, ...] = ()

    @property
    def beds(self) -> tuple[Bed, ...]:
        """All that have cells."""
        return tuple({cell.bed.name: cell.bed for cell in self.cells}.values())

    def left(self) -> tuple[int, float | None]:
        """Cells that have no row yet, and how many seconds they will take; None where nothing tells."""
        rows = read_rows(self.out)
        left = missing(self.cells, VAL, [row for row in rows if row.status == MEASURED or not self.retry])
        seconds = seconds_left(left, rows)
        return len(left), None if seconds is None else seconds / self.processes

    def checked(self) -> StudyOptions:
        """The same options.

        Raises:
            UnsuitableOptionError: a name that is none, or test questions that no bed has.
        """
        if not self.cells:
            raise UnsuitableOptionError("the study has no cells; give it at least one [[row]]")
        methods = {cell.method for cell in self.cells}
        if unknown := [name for name in self.report_test if name not in methods | {BEST}]:
            raise UnsuitableOptionError(
                f"--report-test {unknown[0]} is no row of this study; choose {BEST} or of {', '.join(sorted(methods))}"
            )
        if self.report_test and (without := [bed.name for bed in self.beds if bed.test is None]):
            raise UnsuitableOptionError(f"--report-test needs test samples, and the bed {without[0]} names none")
        return self
