"""The frontier stage of a run: `frontier.json`, the dense and the slim model in every precision that was exported."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import CheckFailedError, OutputError, SlimvlmError
from slimvlm.compress.evaluation.quality import Quality, compare
from slimvlm.compress.files.decoding import read
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.options import FitOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import Progress
from slimvlm.compress.runs import AGAIN, EXPORT, FRONTIER, RunFolder
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.running.evaluation import evaluate_export
from slimvlm.export.stage import exported_formats
from slimvlm.export.variants import FULL
from slimvlm.serve.fitting.trials import bytes_on_disk
from slimvlm.serve.frontier.frontier import Frontier, Point
from slimvlm.serve.options import ONNX, split_backend
from slimvlm.serve.profile import Cell, Profile

QUESTIONS = 600  # at most: differences between precisions are paired, and need no more


@dataclass(frozen=True, slots=True)
class _Models:
    """What is compared, and with what it is asked.

    Attributes:
        folders: `dense` and `slim`, the folders of their exports; `slim` is not there where nothing was cut.
    """

    folders: Mapping[str, Path]
    plan: Plan
    samples: Sequence[Sample]
    options: FitOptions
    progress: Progress

    def quality(self, model: str, variant: str) -> Quality:
        """Of one of them in one precision."""
        graphs = self.folders[model] / EXPORT
        return evaluate_export(graphs, f"{ONNX}:{variant}", self.samples, self.options, self.progress)

    def point(self, model: str, cell: Cell, full: Quality) -> Point:
        """One of them, as a cell of the profile has timed it, against the dense one in full precision."""
        variant = split_backend(cell.backend)[1] or FULL
        quality = self.quality(model, variant)
        removed = self.plan.removed_fraction if model == "slim" else 0.0
        return Point(
            ratio=self.plan.ratio if removed else 0.0,
            removed=removed,
            variant=variant,
            folder=EXPORT if removed else "",
            bytes=bytes_on_disk(self.folders[model], f"{ONNX}:{variant}"),
            quality=compare(full, quality, self.options.seed),
            # Its ratios are to the dense model in the same precision.
            cell=replace(cell, runs={"slim": cell.runs[model]}, ratios={}),
            seconds=round(quality.seconds, 1),
        )


def frontier_stage(
    run: RunFolder,
    options: FitOptions,
    plan: Plan,
    profile: Profile | None,
    samples: Sequence[Sample],
    progress: Progress,
) -> Frontier | None:
    """Write `frontier.json`; None where no ONNX graphs were exported, or they were not timed."""
    path, usable = run.path / FRONTIER, exported_formats(run.facts("export"))
    cells = _cells(profile) if profile is not None and ONNX in usable else []
    backends = [cell.backend for cell in cells]
    if not (run.finished("frontier") and run.facts("frontier")["backends"] == backends):
        path.unlink(missing_ok=True)
        with run.stage("frontier", backends=backends) as facts:
            try:
                if profile is not None and cells:
                    points = _measured(run.path, options, plan, cells, _drawn(samples, options.seed), progress)
                    write_text(path, _frontier(options, plan, profile, points).to_json())
            except SlimvlmError as refused:  # nobody asked for it
                facts["refused"] = str(refused)
    return read(path, Frontier, OutputError, AGAIN) if path.is_file() else None


def _drawn(samples: Sequence[Sample], seed: int) -> Sequence[Sample]:
    return samples if len(samples) <= QUESTIONS else random.Random(seed).sample(samples, QUESTIONS)


def _cells(profile: Profile) -> list[Cell]:
    """Of both models, a question about an image at a time, one for each precision of ONNX."""
    found: dict[str, Cell] = {}
    for cell in profile.cells:
        if split_backend(cell.backend)[0] == ONNX and set(cell.runs) == {"dense", "slim"}:
            found.setdefault(cell.backend, cell)
    return list(found.values())


def _measured(
    out: Path, options: FitOptions, plan: Plan, cells: Sequence[Cell], samples: Sequence[Sample], progress: Progress
) -> list[Point]:
    variants = (FULL, *(name for cell in cells if (name := split_backend(cell.backend)[1])))
    code = options.trust_remote_code
    wanted = ExportOptions(variants=variants, samples=1, max_new_tokens=1, trust_remote_code=code)
    with TemporaryDirectory(prefix=".dense-", dir=out) as scratch:
        with suppress(CheckFailedError):  # of answers, which are looked at here
            export_checkpoint(options.model, Path(scratch) / EXPORT, wanted, progress)
        folders = {"dense": Path(scratch), **({"slim": out} if plan.removed_fraction else {})}
        models = _Models(folders, plan, samples, options, progress)
        full = models.quality("dense", FULL)
        return [models.point(model, cell, full) for model in folders for cell in cells]


def _frontier(options: FitOptions, plan: Plan, profile: Profile, points: Sequence[Point]) -> Frontier:
    return Frontier(
        source=options.model,
        family=plan.family,
        digest=plan.model_digest,
        device=profile.device,
        versions=profile.versions,
        settings=profile.settings,
        points=tuple(points),
        targets=options.target,
    )
