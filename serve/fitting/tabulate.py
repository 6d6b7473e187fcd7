"""The making of a cost table: the dense model beside copies in which one kind of block is narrower, in turns.

Whole models are run, not blocks alone: a block alone lies in the cache of a processor where the whole model streams its
weights from memory at every token, and costs what it never costs in place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.files.locks import locked_file
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import build_meta
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.plan import Plan
from slimvlm.compress.processes import pick_device
from slimvlm.compress.progress import Progress, silent
from slimvlm.export.running import manifest
from slimvlm.serve.fitting.table import CostTable, Point, Setting, kind_of, shape_digest
from slimvlm.serve.fitting.trials import Workbench
from slimvlm.serve.measuring.device import describe_device
from slimvlm.serve.profile import Cell

TAKEN_BY = {"vision": "vision", "tpot": "language"}  # times that the blocks of one modality alone take
TIMES = ("vision", "text", "prefill", "ttft", "tpot")
WIDTHS = (0.75, 0.5, 0.25)  # of the dense units; a floor of a tenth lies below, and costs as much as the smallest


@dataclass(frozen=True, slots=True)
class Narrowed:
    """All blocks of one kind with a share of their units: the plan that makes it."""

    kind: str
    kept: float
    plan: Plan


def cached_table(
    bench: Workbench,
    backend: str,
    folder: Path | None = None,
    progress: Progress = silent,
    widths: Sequence[float] = WIDTHS,
) -> CostTable:
    """The table of a model on this device, measured where the cache does not hold it; an interrupted one goes on.

    Args:
        backend: as `onnx:int8`.
        folder: the cache; None: the user's.
        widths: shares of the units of a kind to measure at.

    Raises:
        SlimvlmError: a copy cannot be made or run; the file of the cache cannot be read.
        UnsuitableOptionError: the device is too noisy for the times that the goals of `bench` are of.
    """
    setting = setting_of(bench, backend)
    path = (folder or user_cache()) / f"{setting.digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(path):
        table = CostTable.read(path, setting) if path.is_file() else CostTable(setting, {}, {})
        todo = [one for one in narrowed_copies(bench, widths) if not _holds(table, one)]
        if todo:
            table = _measured(bench, table, todo, path, progress)
    return table.refuse_noise(goal.name for goal in bench.goals)


def user_cache() -> Path:
    """Where tables are kept: `slimvlm/costs` in XDG_CACHE_HOME, else in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimvlm" / "costs"


def setting_of(bench: Workbench, backend: str) -> Setting:
    """What a table measured now would hold for."""
    options = bench.workload
    device = pick_device(options.device)
    model, _ = build_meta(bench.model, options.trust_remote_code)
    return Setting(
        shape=shape_digest(model),
        device=f"{describe_device(device)['name']}, {options.provider}",
        threads=options.threads or torch.get_num_threads(),
        versions=installed_versions(manifest.VERSIONED),
        backend=backend,
        batch_size=options.batch_sizes[0],
        image_size=options.image_sizes[0] if options.image_sizes else None,
        prompt_tokens=options.prompt_tokens[0] if options.prompt_tokens else None,
        new_tokens=options.new_tokens[0],
    )


def narrowed_copies(bench: Workbench, widths: Sequence[float] = WIDTHS) -> Iterator[Narrowed]:
    """One per width, each once, and kind of block, of those that take some of the times that the goals are of."""
    model, family = build_meta(bench.model, bench.workload.trust_remote_code)
    groups = find_groups(model, family)
    facts, random = facts_of(model, groups), score_groups(groups, CRITERIA["random"])
    taken = {TAKEN_BY.get(goal.name) for goal in bench.goals} or {None}  # None: blocks of both
    for kind in dict.fromkeys(kind_of(group) for group in groups if taken & {group.modality, None}):
        members, seen = [group for group in groups if kind_of(group) == kind], {1.0}
        for width in widths:
            gone = {group.key: group.num_units - max(1, round(width * group.num_units)) for group in members}
            lost = sum(gone[group.key] * group.parameters_per_unit for group in members)
            kept = 1 - lost / sum(int(group.parameters.sum()) for group in members)
            if kept in seen:
                continue
            seen.add(kept)
            values = {group.key: (torch.arange(group.num_units) >= gone.get(group.key, 0)).float() for group in groups}
            free = sum(dead.parameters for dead in facts.dead.values())
            ratio = (lost + free + 0.5) / facts.parameters  # half a parameter more: nothing is lost to rounding
            budget = Budget(ratio=ratio, floor=0.0, allocator="global")
            yield Narrowed(kind, kept, plan_units(groups, replace(random, values=values), budget, facts))


def dense_plan(bench: Workbench) -> Plan:
    """The plan that removes nothing but dead blocks."""
    model, family = build_meta(bench.model, bench.workload.trust_remote_code)
    groups = find_groups(model, family)
    return plan_units(groups, score_groups(groups, CRITERIA["random"]), Budget(ratio=0.0), facts_of(model, groups))


def _measured(
    bench: Workbench, table: CostTable, todo: Sequence[Narrowed], path: Path, progress: Progress
) -> CostTable:
    """The table with what is to be done, written after every copy."""
    backend = table.setting.backend
    with TemporaryDirectory(prefix="slimvlm-table-") as scratch:
        dense = Path(scratch) / "dense"
        progress("table", 0, len(todo), backend)
        bench.make(dense_plan(bench), dense, backend)
        for done, one in enumerate(todo):
            progress("table", done, len(todo), f"{backend}, {one.kind} at {one.kept:.0%}")
            with TemporaryDirectory(dir=scratch) as folder:
                bench.make(one.plan, Path(folder), backend)
                cell = bench.compare(Path(folder), backend, dense)
            table = _with(table, one, cell)
            table.save(path)
        progress("table", len(todo), len(todo))
    return table


def _with(table: CostTable, one: Narrowed, cell: Cell) -> CostTable:
    """The table with one more point.

    A time is the fastest turn there was: what else runs on a machine makes turns slower and none faster, so the fastest
    ones of many are nearer to each other than their medians. Noise is what one start more or less would change.
    """
    dense, slim = cell.runs["dense"], cell.runs["slim"]
    times, share, noise = dict(table.dense), dict[str, float](), dict[str, float]()
    for phase in (phase for phase in TIMES if phase in slim.seconds):
        pairs = [(min(one), min(other)) for one, other in zip(slim.seconds[phase], dense.seconds[phase], strict=True)]
        share[phase] = _share(pairs)
        others = [_share([*pairs[:start], *pairs[start + 1 :]]) for start in range(len(pairs)) if len(pairs) > 1]
        noise[phase] = max((abs(other / share[phase] - 1) for other in others), default=1.0)
        times[phase] = min(times.get(phase, math.inf), 1000 * min(time for _, time in pairs))
    points = sorted((*table.points.get(one.kind, ()), Point(one.kept, share, noise)), key=lambda known: -known.kept)
    return replace(table, dense=times, points={**table.points, one.kind: tuple(points)})


def _share(pairs: Sequence[tuple[float, float]]) -> float:
    """The fastest of the narrowed copy over the fastest of the dense model."""
    return min(slim for slim, _ in pairs) / min(dense for _, dense in pairs)


def _holds(table: CostTable, one: Narrowed) -> bool:
    return any(point.kept == one.kept for point in table.points.get(one.kind, ()))
