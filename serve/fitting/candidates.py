"""The candidates of a run: each is tried once, and is in `fit.json` as soon as it was.

A killed search asks for the same ones again, and finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from slimvlm.compress.files.decoding import dump
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import Progress
from slimvlm.serve.fitting.goals import DROP, split_goals
from slimvlm.serve.fitting.record import Fit, Trial
from slimvlm.serve.fitting.search import Found
from slimvlm.serve.fitting.trials import Workbench


@dataclass(slots=True)
class Candidates:
    """See the top of this file.

    Attributes:
        path: of `fit.json`.
        plan_at: the plan of a ratio.
        fit: what is known.
        expected: about how many will be tried.
    """

    path: Path
    plan_at: Callable[[float], Plan]
    bench: Workbench
    fit: Fit
    expected: int
    progress: Progress

    def __post_init__(self) -> None:
        self._write(self.fit)

    def try_out(self, ratio: float, backend: str) -> Trial:
        """What a candidate costs, and where there is a bound on it, what it loses; from the file where it is there."""
        wanted, earlier = self._wanted(ratio), self._known(ratio, backend)
        if earlier is not None and wanted <= set(earlier.figures):
            return earlier
        done = len(self.fit.trials)
        self.progress("fit", done, max(self.expected, done + 1), f"{backend}, {ratio:.1%} removed")
        trial = self.bench.try_out(self.plan_at(ratio), ratio, backend, wanted)
        self._write(replace(self.fit, trials=(*(one for one in self.fit.trials if one is not earlier), trial)))
        return trial

    def end(self, found: Found) -> Fit:
        """The finished file, with what was tried for these targets."""
        self._write(replace(self.fit, trials=found.trials, chosen=found.trial))
        self.progress("fit", 1, 1)
        return self.fit

    def _known(self, ratio: float, backend: str) -> Trial | None:
        return next((one for one in self.fit.trials if (one.ratio, one.backend) == (ratio, backend)), None)

    def _wanted(self, ratio: float) -> set[str]:
        """A bound on the loss beside costs is one on whole models: what a cut loses is known after its training."""
        costs, bound = split_goals(self.fit.goals)
        names = {goal.name for goal in costs} or {"size"}
        return names | {DROP} if bound and (not ratio or not costs) else names

    def _write(self, fit: Fit) -> None:
        self.fit = fit
        write_text(self.path, dump(asdict(fit), indent=1, sort_keys=True) + "\n")
