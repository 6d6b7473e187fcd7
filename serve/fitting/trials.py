"""A candidate, tried: cut, saved, exported in its precision, and measured by what `slimvlm profile` measures with.

Nothing is trained: of a cut it is told what it costs, or what it loses before its training.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from slimvlm.compress.data.samples import Sample
from slimvlm.compress.data.splits import Measured, read_validation
from slimvlm.compress.errors import CheckFailedError, DeviceError, UnsuitableOptionError
from slimvlm.compress.evaluation.quality import Quality
from slimvlm.compress.models.checkpoint import load_model, weight_files
from slimvlm.compress.models.computing import load_to_compute
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import PlanOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.processes import pick_device
from slimvlm.compress.progress import silent
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.stages.evaluate import evaluate_model
from slimvlm.compress.stages.slice import save_cut
from slimvlm.export import evaluate_export, export_checkpoint
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.manifest import inside
from slimvlm.export.variants import FULL
from slimvlm.serve.fitting.goals import DROP, WITHIN, Goal
from slimvlm.serve.fitting.record import Figures, Trial
from slimvlm.serve.judging.limits import peak_memory
from slimvlm.serve.options import TORCH, ProfileOptions, split_backend
from slimvlm.serve.profile import MEASURED, PHASES, Cell
from slimvlm.serve.profiling import measure_first
from slimvlm.serve.targets import graph_options

STEADY, WILDEST, MEASUREMENTS = 0.03, 0.1, 3  # spread: is no reason to measure again; is refused in the end
QUESTIONS = 600  # at most: losses are paired, and need no more


@dataclass(frozen=True)
class Losses:
    """How many points less than the dense checkpoint candidates get, on questions that are not those of the evaluation
    (see `read_validation`); mean of tasks.
    """

    options: PlanOptions
    data: Measured

    @cached_property
    def questions(self) -> Sequence[Sample]:
        """The same ones for all."""
        return read_validation(self.options, self.data, min(self.options.eval_samples or QUESTIONS, QUESTIONS))

    @cached_property
    def dense(self) -> Quality:
        """Of the checkpoint that is compressed."""
        return evaluate_model(self.options, self.options.model, self.questions, silent)

    def of(self, folder: Path, backend: str) -> float:
        """Points that the candidate in `folder` loses in a backend; below 0 where it is better."""
        if backend == TORCH:
            quality = evaluate_model(self.options, str(folder / "model"), self.questions, silent)
        else:
            quality = evaluate_export(folder / "export", backend, self.questions, self.options, silent)
        return 100 * (self.dense.score - quality.score)

    def cut(self, plan: Plan, folder: Path) -> None:
        """The checkpoint `folder` of a cut as the run would make it, up to the training."""
        save_cut(
            folder, load_to_compute(self.options, self.options.model), self.options, plan, self.data.calibration, silent
        )


@dataclass(frozen=True, slots=True)
class Workbench:
    """Where candidates are tried.

    Attributes:
        model: the dense checkpoint.
        workload: device, threads, sizes and effort; its models and its backend are replaced.
        goals: what figures are held against.
        losses: what tells how much is lost.
    """

    model: str
    workload: ProfileOptions
    goals: Sequence[Goal] = ()
    losses: Losses | None = None

    def try_out(self, plan: Plan, ratio: float, backend: str, wanted: Collection[str]) -> Trial:
        """The figures of a cut in one precision.

        The weights are the dense model's, neither fitted nor trained after the cut, unless it is asked what is lost:
        what a candidate costs does not depend on their values.

        Args:
            wanted: names of quantities; no more is made or measured than they need. A whole model in another precision
                that meets all goals tells what it loses, too.

        Raises:
            SlimvlmError: it cannot be made or run, with the reason.
            UnsuitableOptionError: the device is too noisy for a time that decides.
        """
        figures, spread, wanted = {"params": float(plan.parameters_after)}, dict[str, float](), set(wanted)
        if wanted - {"params"} or self._tells_loss(ratio, backend, figures):
            with TemporaryDirectory(prefix="slimvlm-fit-") as scratch:
                folder = Path(scratch)
                if DROP in wanted and ratio and self.losses is not None:
                    self.losses.cut(plan, folder / "model")
                    self._export(folder, backend)
                else:
                    self.make(plan, folder, backend)
                figures["size"] = float(bytes_on_disk(folder, backend))
                if wanted - {"params", "size", DROP}:
                    measured, spread = self._measure(folder, backend)
                    figures |= measured
                if self.losses is not None and (DROP in wanted or self._tells_loss(ratio, backend, figures)):
                    figures[DROP] = self.losses.of(folder, backend)
        return Trial(ratio, backend, figures, spread)

    def make(self, plan: Plan, folder: Path, backend: str) -> None:
        """The candidate as a checkpoint `folder/model`, and beside it, in `folder/export`, what the backend runs."""
        loaded = load_model(self.model, trust_remote_code=self.workload.trust_remote_code)
        save_checkpoint(folder / "model", apply_plan(loaded.model, plan), loaded.processor, plan, plan.layout)
        self._export(folder, backend)

    def compare(self, folder: Path, backend: str, dense: Path | None = None) -> Cell:
        """The candidate that was made in `folder`, beside the one in `dense`, in turns, or alone.

        Raises:
            DeviceError: it cannot be run.
        """
        against = None if dense is None else str(dense / "model")
        models = replace(self.workload, slim=str(folder / "model"), against=against, backend=(backend,))
        cell = measure_first(replace(models, decoder_tests=False))
        if cell.status != MEASURED:
            raise DeviceError(f"a candidate cannot be measured in {backend}: {cell.reason}; fit to another --backend")
        return cell

    def _export(self, folder: Path, backend: str) -> None:
        if backend != TORCH:
            code = self.workload.trust_remote_code
            options = replace(graph_options((backend,)), samples=1, max_new_tokens=1, trust_remote_code=code)
            with suppress(CheckFailedError):  # of answers; what is written can be run
                export_checkpoint(folder / "model", folder / "export", options)

    def _tells_loss(self, ratio: float, backend: str, figures: Figures) -> bool:
        """Whether it is a whole model in another precision that meets the goals."""
        known = [goal for goal in self.goals if goal.name in figures]
        return (
            not ratio
            and split_backend(backend)[1] not in (None, FULL)
            and self.losses is not None
            and self.losses.data.held_out
            and all(goal.is_met(figures[goal.name]) for goal in known)
        )

    def _measure(self, folder: Path, backend: str) -> tuple[dict[str, float], dict[str, float]]:
        """Figures and spread: of the first measurement that decides, else of the steadiest."""
        kind = pick_device(self.workload.device).type
        found: list[tuple[float, dict[str, float], dict[str, float]]] = []
        while len(found) < MEASUREMENTS and (not found or found[-1][0] > STEADY):
            run = self.compare(folder, backend).runs["slim"]
            figures = {phase: 1000 * seconds for phase, seconds in run.medians.items() if phase in PHASES}
            if (peak := peak_memory(run.memory, kind)) is not None:
                figures["memory"] = float(peak)
            starts = {phase: [median(rounds) for rounds in run.seconds[phase]] for phase in run.medians}
            spread = {phase: (max(each) - min(each)) / 2 / run.medians[phase] for phase, each in starts.items()}
            found.append((doubt(self.goals, figures, spread), figures, spread))
        worst, figures, spread = min(found, key=lambda one: one[0])
        if worst > WILDEST:
            raise UnsuitableOptionError(
                f"this machine is too noisy to fit to times: restarts of one process differ by {worst:.0%} to either "
                f"side, {WILDEST:.0%} is accepted; let it do nothing else meanwhile, or fit to size or params"
            )
        return figures, spread


def doubt(goals: Sequence[Goal], figures: Figures, spread: Figures) -> float:
    """The largest spread of a time that lies so near to its target that the spread decides whether it is met."""
    near = [
        spread[goal.name]
        for goal in goals
        if goal.name in spread and abs(goal.excess(figures[goal.name]) - 1) <= WITHIN + 2 * spread[goal.name]
    ]
    return max(near, default=0.0)


def bytes_on_disk(folder: Path, backend: str) -> int:
    """Of what a backend runs: the graphs of its variant with their weights, or the weights of the checkpoint."""
    if backend == TORCH:
        return sum(path.stat().st_size for path in weight_files(folder / "model"))
    export = Exported.open(folder / "export")
    names = {artifact.file for artifact in export.graphs[export.backend(*split_backend(backend)) or ""]}
    names |= {f"{name}_data" for name in names} & set(export.manifest.files)
    return sum(inside(export.folder, name).stat().st_size for name in names)
