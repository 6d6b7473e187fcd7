"""What the cells of a study are made of: samples, scores of the dense model, plans.

What cells share is made once, by the process that is there first, and kept in the folder: one calibration for each
criterion and set, and one plan where several ratios are cut by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.criteria.scoring import Scores
from slimvlm.compress.data.samples import Sample, SampleSet, load_samples
from slimvlm.compress.data.splits import Measured, Trained, read_measured, read_trained
from slimvlm.compress.errors import OutputError, SampleError
from slimvlm.compress.files.decoding import dump, read, refused_as
from slimvlm.compress.files.locks import locked_folder
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import silent
from slimvlm.compress.runs import AGAIN, PLAN, SCORES, RunFolder
from slimvlm.compress.stages.plan import dense_scores, plan_stage, planning_of, read_plan
from slimvlm.serve.study.study import TEST, VAL, Bed, Cell, digest

PLANS, CALIBRATIONS = "plans", "calibrations"  # folders of a study
SECONDS = "seconds.json"
# Options that do not change what the units of the dense model are worth.
AFTER_SCORES = {
    *("ratio", "largest", "allocator", "rounds", "equal_rounds", "tower_ratio", "kind_ratio", "round_channels"),
    *("layout", "cost", "compensation", "compensate_rounds", "guard", "eval_samples"),
}
Thing = TypeVar("Thing")


@dataclass
class Makings:
    """In the folder `out` of a study. Samples are read once by a process."""

    out: Path
    _kept: dict[Hashable, object] = field(default_factory=dict)

    def questions(self, bed: Bed, split: str) -> Sequence[Sample]:
        """What the models of a bed are asked: the same for every cell.

        Raises:
            SampleError: the test questions show an image that models are cut, trained or chosen with.
        """
        return self._once(("questions", bed.name, split), lambda: _questions(bed, split)).samples

    def samples(self, cell: Cell) -> Measured:
        """What it calibrates on, without the images of the validation questions; and those questions."""
        options, asked = cell.options, self.questions(cell.bed, VAL)
        key = ("samples", cell.bed.name, options.samples, options.seed, options.prefix_split)
        everything = replace(options, eval_samples=None)
        return replace(self._once(key, lambda: read_measured(everything)), evaluation=asked)

    def trained(self, cell: Cell) -> Trained:
        """What it is trained on."""
        return read_trained(cell.options, self.samples(cell))

    def plan(self, cell: Cell) -> tuple[Plan, float]:
        """The plan it is cut by, and how many seconds that took, calibrations included.

        Raises:
            InUseError: another process is making it.
        """
        options = replace(cell.options, ratio=cell.largest)
        asked = options.identity()
        folder = self.out / PLANS / digest(cell.bed.name, asked)
        with locked_folder(folder):
            run = RunFolder(folder, asked, resume=True)
            spent = folder / SECONDS
            if not run.finished("plan"):
                scores, seconds = self._scores(cell)
                began = time.perf_counter()
                with run.begun():
                    plan_stage(run, options, self.samples(cell), silent, known=scores)
                write_text(spent, dump(round(seconds + time.perf_counter() - began, 3)))
            return read_plan(folder / PLAN, cell.options.ratio), read(spent, float, OutputError, AGAIN)

    def _scores(self, cell: Cell) -> tuple[Scores | None, float]:
        """Of the dense model, and the seconds they took; none by a criterion that asks no data."""
        criterion = planning_of(cell.options).criterion
        if (
            cell.options.depth_ratio or not criterion.calibration().statistics
        ):  # blocks leave first: others are looked at
            return None, 0.0
        asked = {name: value for name, value in cell.options.identity().items() if name not in AFTER_SCORES}
        asked["asks"] = ALLOCATORS[cell.options.allocator].asks
        folder = self.out / CALIBRATIONS / digest(cell.bed.name, asked)
        with locked_folder(folder):
            spent = folder / SECONDS
            if not spent.is_file():
                began = time.perf_counter()
                dense_scores(cell.options, self.samples(cell), silent).save(folder / SCORES)
                write_text(spent, dump(round(time.perf_counter() - began, 3)))
            with refused_as(folder / SCORES, OutputError, AGAIN):
                return Scores.read(folder / SCORES, criterion), read(spent, float, OutputError, AGAIN)

    def _once(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        if key not in self._kept:
            self._kept[key] = make()
        found: Thing = self._kept[key]  # type: ignore[assignment]
        return found


def _questions(bed: Bed, split: str) -> SampleSet:
    limit = bed.options.get("eval_samples")
    if split != TEST or bed.test is None:
        return load_samples(bed.val, limit=limit)
    asked = load_samples(bed.test, limit=limit)
    for path in (bed.data, bed.val):
        shown = {sample.image_key for sample in load_samples(path).samples}
        if both := sum(sample.image_key in shown for sample in asked.samples):
            raise SampleError(
                f"{both} of the test samples {asked.source} show images of {path}, which models are cut, trained or "
                "chosen with; give other samples to one of them"
            )
    return asked
