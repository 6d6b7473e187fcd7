"""A candidate, tried: cut, saved, exported in its precision, and measured by what `slimvlm profile` measures with.

The weights are the dense model's, neither fitted nor trained after the cut: what a candidate costs does not depend on
their values, and what it answers is not looked at.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from slimvlm.compress.errors import CheckFailedError, DeviceError, UnsuitableOptionError
from slimvlm.compress.models.checkpoint import load_model, weight_files
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.plan import Plan
from slimvlm.compress.processes import pick_device
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.export import export_checkpoint
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.manifest import inside
from slimvlm.serve.fitting.record import Trial
from slimvlm.serve.judging.limits import peak_memory
from slimvlm.serve.options import TORCH, ProfileOptions, split_backend
from slimvlm.serve.profile import MEASURED, PHASES, Cell
from slimvlm.serve.profiling import measure_first
from slimvlm.serve.targets import graph_options

STEADY, WILDEST, MEASUREMENTS = 0.03, 0.1, 3  # spread: is no reason to measure again; is refused in the end


@dataclass(frozen=True, slots=True)
class Workbench:
    """Where candidates are tried.

    Attributes:
        model: the dense checkpoint.
        workload: device, threads, sizes and effort; its models and its backend are replaced.
    """

    model: str
    workload: ProfileOptions

    def try_out(self, plan: Plan, ratio: float, backend: str, wanted: Collection[str]) -> Trial:
        """The figures of a cut in one precision.

        Args:
            wanted: names of quantities; no more is made or measured than they need.

        Raises:
            SlimvlmError: it cannot be made or run, with the reason.
            UnsuitableOptionError: the device is too noisy for a time that is wanted.
        """
        figures, spread = {"params": float(plan.parameters_after)}, dict[str, float]()
        if set(wanted) - {"params"}:
            with TemporaryDirectory(prefix="slimvlm-fit-") as scratch:
                folder = Path(scratch)
                self.make(plan, folder, backend)
                figures["size"] = float(bytes_on_disk(folder, backend))
                if set(wanted) - {"params", "size"}:
                    measured, spread = self._measure(folder, backend, wanted)
                    figures |= measured
        return Trial(ratio, backend, figures, spread)

    def make(self, plan: Plan, folder: Path, backend: str) -> None:
        """The candidate as a checkpoint `folder/model`, and beside it, in `folder/export`, what the backend runs."""
        code = self.workload.trust_remote_code
        loaded = load_model(self.model, trust_remote_code=code)
        save_checkpoint(folder / "model", apply_plan(loaded.model, plan), loaded.processor, plan, plan.layout)
        if backend != TORCH:
            options = replace(graph_options((backend,)), samples=1, max_new_tokens=1, trust_remote_code=code)
            with suppress(CheckFailedError):  # of answers; what is written can be run
                export_checkpoint(folder / "model", folder / "export", options)

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

    def _measure(
        self, folder: Path, backend: str, wanted: Collection[str]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Figures and spread, of the steadiest of as many measurements as it takes to find a steady one."""
        kind = pick_device(self.workload.device).type
        found: list[tuple[float, dict[str, float], dict[str, float]]] = []
        while len(found) < MEASUREMENTS and (not found or found[-1][0] > STEADY):
            run = self.compare(folder, backend).runs["slim"]
            figures = {phase: 1000 * seconds for phase, seconds in run.medians.items() if phase in PHASES}
            if (peak := peak_memory(run.memory, kind)) is not None:
                figures["memory"] = float(peak)
            starts = {phase: [median(rounds) for rounds in run.seconds[phase]] for phase in run.medians}
            spread = {phase: (max(each) - min(each)) / 2 / run.medians[phase] for phase, each in starts.items()}
            found.append((max((spread.get(name, 0.0) for name in wanted), default=0.0), figures, spread))
        worst, figures, spread = min(found, key=lambda one: one[0])
        if worst > WILDEST:
            raise UnsuitableOptionError(
                f"this machine is too noisy to fit to times: restarts of one process differ by {worst:.0%} to either "
                f"side, {WILDEST:.0%} is accepted; let it do nothing else meanwhile, or fit to size or params"
            )
        return figures, spread


def bytes_on_disk(folder: Path, backend: str) -> int:
    """Of what a backend runs: the graphs of its variant with their weights, or the weights of the checkpoint."""
    if backend == TORCH:
        return sum(path.stat().st_size for path in weight_files(folder / "model"))
    export = Exported.open(folder / "export")
    names = {artifact.file for artifact in export.graphs[export.backend(*split_backend(backend)) or ""]}
    names |= {f"{name}_data" for name in names} & set(export.manifest.files)
    return sum(inside(export.folder, name).stat().st_size for name in names)
