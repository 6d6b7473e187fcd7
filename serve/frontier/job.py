"""`slimvlm frontier`: one calibration, many cuts, every one of them in several precisions, each measured.

The plan of the largest cut holds those of all smaller ones. Each cut is a run folder of its own in `cuts/`, so that an
interrupted frontier goes on where it was; `frontier.json` is written anew after every point. Points that an earlier
process did not time are timed when it goes on: what a model answers can be measured where the machine is busy, its
times later, or on the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from slimvlm.compress.data.splits import Measured, read_measured, read_trained
from slimvlm.compress.errors import CheckFailedError, OutputError, SlimvlmError
from slimvlm.compress.evaluation.quality import Quality, compare
from slimvlm.compress.files.decoding import dump, read
from slimvlm.compress.files.folders import refuse_inside
from slimvlm.compress.files.locks import locked_folder
from slimvlm.compress.files.writing import VERSIONED, installed_versions, write_text
from slimvlm.compress.models.checkpoint import locate
from slimvlm.compress.processes import pick_device
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.recovery.checks import check_models, recipe_of
from slimvlm.compress.runs import AGAIN, CUTS, EXPORT, FRONTIER, MODEL, PLAN, RunFolder
from slimvlm.compress.stages.cut import cut_by_plan
from slimvlm.compress.stages.plan import check_plan, chosen_criterion, plan_stage, read_plan
from slimvlm.export import export_checkpoint
from slimvlm.export.packages import require_packages
from slimvlm.export.running import manifest
from slimvlm.export.running.evaluation import evaluate_export
from slimvlm.export.running.exported import is_export
from slimvlm.export.variants import FULL
from slimvlm.serve.fitting.trials import bytes_on_disk
from slimvlm.serve.frontier.frontier import Frontier, Point, point_name
from slimvlm.serve.frontier.options import FrontierOptions
from slimvlm.serve.frontier.schedule import fits, informative_order
from slimvlm.serve.measuring.device import available_cores, measure_device
from slimvlm.serve.options import ONNX, ProfileOptions
from slimvlm.serve.profiling import measure_first

DENSE = f"{CUTS}/0"
CELL_SECONDS = 4.0  # a third of what `slimvlm profile` takes: there are many


def measure_frontier(options: FrontierOptions, progress: Progress = silent) -> Frontier:
    """Make and measure every point there is time for; `frontier.json` in the folder always holds what is done.

    Raises:
        SlimvlmError: refused, with the reason.
    """
    options = options.checked()
    asked = options.cut
    chosen_criterion(asked)
    if asked.recover != "none":
        recipe_of(asked)
    require_packages(options.export(0.0, asked.data).checked())
    refuse_inside(asked.out, {name: getattr(asked, name) for name in ("model", "data", "eval_data", "recover_data")})
    with locked_folder(asked.out):
        identity = {**asked.identity(), "variants": list(options.variants), "exporter": options.exporter}
        run = RunFolder(asked.out, identity, resume=asked.resume, overwrite=asked.overwrite)
        data = read_measured(asked)
        if not run.finished("plan"):
            check_plan(asked)
            if asked.recover != "none":
                check_models(asked, asked.attention_unit)
        with run.begun():
            plan = plan_stage(run, asked, data, progress)
            return _Exploration(options, run, data, progress).walk(_known(options, plan.family))


def _known(options: FrontierOptions, family: str) -> Frontier:
    """What an earlier process measured, or a frontier without points; the device is that of the times."""
    asked, path = options.cut, options.out / FRONTIER
    earlier = read(path, Frontier, OutputError, AGAIN) if path.is_file() else None
    if earlier is not None and any(point.cell is not None for point in earlier.points):
        return replace(earlier, targets=options.target, skipped={}, left=())
    device = pick_device(asked.device)
    threads = options.threads or available_cores()
    _, digest = locate(asked.model)
    settings = {
        "variants": list(options.variants),
        "exporter": options.exporter,
        "eval_samples": asked.eval_samples,
        "recover": asked.recover,
    }
    return Frontier(
        source=asked.model,
        family=family,
        digest=digest,
        device=measure_device(device, threads, ("fp32",)),
        versions=installed_versions((*VERSIONED, *manifest.VERSIONED)),
        settings={**settings, "steps": asked.steps, "threads": threads, "cell_seconds": CELL_SECONDS},
        points=() if earlier is None else earlier.points,
        targets=options.target,
    )


@dataclass(slots=True)
class _Exploration:
    """The walk over all points; a cut that cannot be made, or a precision that cannot be run, is noted and left out."""

    options: FrontierOptions
    run: RunFolder
    data: Measured
    progress: Progress

    def walk(self, frontier: Frontier) -> Frontier:
        """Every point of every ratio, the most telling ratios first."""
        began, seconds = time.monotonic(), list[float]()
        order = informative_order(self.options.cuts)
        total, budget = sum(len(self._variants(ratio)) for ratio in order), self.options.minutes
        for ratio in order:
            missing = [name for name in self._variants(ratio) if not self._is_whole(frontier.find(ratio, name))]
            spent = time.monotonic() - began
            if missing and not fits(spent, seconds, None if budget is None else 60 * budget):
                frontier = replace(frontier, left=(*frontier.left, *(point_name(ratio, name) for name in missing)))
                continue
            for name in missing:
                whole = sum(map(self._is_whole, frontier.points))
                self.progress("frontier", whole + len(frontier.skipped), total, point_name(ratio, name))
                try:
                    point = frontier.find(ratio, name) or self._point(ratio, name)
                    frontier = frontier.with_point(self._timed(point) if self.options.times else point)
                except SlimvlmError as refused:
                    skipped = {**frontier.skipped, point_name(ratio, name): str(refused)}
                    frontier = replace(frontier, skipped=skipped)
                write_text(self.options.out / FRONTIER, frontier.to_json())
            if missing:
                seconds.append(time.monotonic() - began - spent)
        write_text(self.options.out / FRONTIER, frontier.to_json())
        self.progress("frontier", total, total)
        return frontier

    def _variants(self, ratio: float) -> Sequence[str]:
        """The precisions of a cut; full precision of the dense model comes first: all others are held against it."""
        return self.options.variants if ratio else tuple(dict.fromkeys((FULL, *self.options.variants)))

    def _is_whole(self, point: Point | None) -> bool:
        """Whether all that was asked for was measured."""
        return point is not None and (point.cell is not None or not self.options.times)

    def _point(self, ratio: float, variant: str) -> Point:
        """Its bytes and its quality."""
        began = time.monotonic()
        folder, removed = self._made(ratio)
        quality = self._quality(folder, variant)
        return Point(
            ratio=ratio,
            removed=removed,
            variant=variant,
            folder=(folder / EXPORT).relative_to(self.options.out).as_posix(),
            bytes=bytes_on_disk(folder, f"{ONNX}:{variant}"),
            quality=compare(self._quality(self.options.out / DENSE, FULL), quality, self.options.cut.seed),
            cell=None,
            seconds=round(time.monotonic() - began, 1),
        )

    def _timed(self, point: Point) -> Point:
        """The same with its times, beside those of the dense model in full precision."""
        began, asked, backend = time.monotonic(), self.options.cut, f"{ONNX}:{point.variant}"
        is_full = point.is_dense and point.variant == FULL
        cell = measure_first(
            ProfileOptions(
                slim=f"{self.options.out / point.folder}:{backend}",
                against=None if is_full else f"{self.options.out / DENSE / EXPORT}:{ONNX}:{FULL}",
                backend=(backend,),
                device=asked.device,
                threads=self.options.threads,
                batch_sizes=(1,),
                decoder_tests=False,
                cell_seconds=CELL_SECONDS,
                data=asked.eval_data or asked.data,
                seed=asked.seed,
                trust_remote_code=asked.trust_remote_code,
            )
        )
        return replace(point, cell=cell, seconds=round(point.seconds + time.monotonic() - began, 1))

    def _made(self, ratio: float) -> tuple[Path, float]:
        """The folder of a cut, with `export/` in it, and the fraction it removes."""
        folder, removed, model = self.options.out / CUTS / f"{ratio:g}", 0.0, Path(self.options.cut.model)
        folder.mkdir(parents=True, exist_ok=True)
        if ratio:
            removed, model = self._cut(ratio, folder), folder / MODEL
        if not is_export(folder / EXPORT):
            data = self.options.cut.eval_data or self.options.cut.data
            with suppress(CheckFailedError):  # its quality is measured here, and shown
                export_checkpoint(model, folder / EXPORT, self.options.export(ratio, data), self.progress)
        return folder, removed

    def _cut(self, ratio: float, folder: Path) -> float:
        """Cut, fit and train; what an earlier process finished is kept."""
        plan = read_plan(self.options.out / PLAN, ratio)
        training = cache(partial(read_trained, self.options.cut, self.data))
        cut_by_plan(folder, replace(self.options.cut, ratio=ratio), plan, self.data, training, self.progress)
        return plan.removed_fraction

    def _quality(self, folder: Path, variant: str) -> Quality:
        """Measured once: the answers stay beside the graphs."""
        path = folder / f"quality-{variant}.json"
        if path.is_file():
            return read(path, Quality, OutputError, AGAIN)
        graphs = folder / EXPORT
        found = evaluate_export(graphs, f"{ONNX}:{variant}", self.data.evaluation, self.options.cut, self.progress)
        write_text(path, dump(found.to_dict(), indent=1) + "\n")
        return found
