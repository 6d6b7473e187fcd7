"""The fit stage of a run: the beginning of its order of removal, and the precision, that meet the targets.

It has two halves. The whole model is tried before anything is calibrated; only where it does not do is an order of
removal made, and cuts are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from slimvlm.compress import processes
from slimvlm.compress.allocate.costs import Times
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.data.splits import Measured
from slimvlm.compress.errors import OutputError, UnsuitableOptionError
from slimvlm.compress.files.decoding import read
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.models.checkpoint import build_meta, locate
from slimvlm.compress.models.computing import frees_memory
from slimvlm.compress.models.families import MODALITIES
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.options import FitOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.processes import pick_device
from slimvlm.compress.progress import Progress
from slimvlm.compress.runs import AGAIN, FIT, ORDER, PLAN, RunFolder
from slimvlm.compress.stages.plan import whole_plan
from slimvlm.export.packages import require_packages
from slimvlm.export.variants import FULL, VARIANTS
from slimvlm.serve.fitting.candidates import Candidates
from slimvlm.serve.fitting.goals import MILLISECONDS, Goal, read_goals, split_goals
from slimvlm.serve.fitting.record import Figures, Fit, Trial
from slimvlm.serve.fitting.search import Foretell, Found, find_cut, find_whole
from slimvlm.serve.fitting.smallest import find_smallest
from slimvlm.serve.fitting.table import CostTable
from slimvlm.serve.fitting.tabulate import cached_table
from slimvlm.serve.fitting.trials import Losses, Workbench
from slimvlm.serve.measuring.device import describe_device
from slimvlm.serve.options import TORCH, ProfileOptions, split_backend
from slimvlm.serve.targets import graph_options

Options = TypeVar("Options", bound=FitOptions)
HALVINGS = 6  # until the largest cut is known, as a rule: for the time that is left
CELL_SECONDS = 6.0  # of measuring a candidate, as the profile stage takes


def check_targets(options: FitOptions, by_time: bool) -> None:
    """Refuse targets before anything is calibrated for them.

    Args:
        by_time: units are ranked by measured times.

    Raises:
        UnsuitableOptionError: an unknown or contradicting target, backend or precision.
        MissingDependencyError: what the backend needs is not installed.
    """
    if by_time and (not _times(options) or processes.numbered("WORLD_SIZE", 1) > 1):
        raise UnsuitableOptionError(
            "--cost milliseconds needs a --target of vision, ttft or tpot, and a single process to measure it"
        )
    if not options.target:
        return
    read_goals(options.target)
    backends = backends_of(options)
    if backends != (TORCH,):
        require_packages(graph_options(backends).checked())


def backends_of(options: FitOptions) -> tuple[str, ...]:
    """The precisions to choose among, the most exact first."""
    if options.backend == TORCH:
        if options.variants:
            raise UnsuitableOptionError(
                "--variants are of exported graphs, and in torch only float weights are fitted to targets; leave it "
                "out and put the result in 8 or 4 bits by slimvlm quantize, or use --backend onnx"
            )
        return (TORCH,)
    if unknown := [name for name in options.variants if name not in VARIANTS]:
        raise UnsuitableOptionError(f"--variants {unknown[0]} is unknown; choose from {', '.join(VARIANTS)}")
    return tuple(f"{options.backend}:{name}" for name in VARIANTS if name in (options.variants or (FULL,)))


def measured_times(options: FitOptions, progress: Progress) -> Times:
    """What the targets of time weigh blocks by: a table of the coarsest precision, which is the one that is cut if any
    is. Measured where the cache does not hold it.

    Raises:
        UnsuitableOptionError: this model has no such time, or the device is too noisy.
    """
    goals = _times(options)
    table = _table(options, progress)
    if missing := [goal.name for goal in goals if goal.name not in table.dense]:
        raise UnsuitableOptionError(
            f"--target {missing[0]}: this model has no such time here; it has {', '.join(table.dense)}"
        )
    model, family = build_meta(options.model, options.trust_remote_code)
    return table.times(find_groups(model, family), {goal.name: goal.amount for goal in goals})


def _table(options: FitOptions, progress: Progress) -> CostTable:
    bench = Workbench(options.model, workload_of(options), _times(options))
    return cached_table(bench, backends_of(options)[-1], progress=progress)


def _times(options: FitOptions) -> list[Goal]:
    return [goal for goal in read_goals(options.target) if goal.quantity.units is MILLISECONDS]


@frees_memory
def fit_whole(run: RunFolder, options: FitOptions, data: Measured, progress: Progress) -> Fit | None:
    """Try the whole model in every precision, before anything is calibrated: what was found if one of them meets the
    targets, with its plan, which removes nothing, as `plan.json`; None if a cut is needed. Every process calls it.

    Raises:
        InfeasibleBudgetError: every precision alone loses more than may be lost.
    """
    if not options.target:
        _back_to_the_ratio(run)
        return None
    if is_open := not _is_fitted(run, options):
        run.forget("slice")  # by all processes: what follows is decided by each of them
    if run.writer and is_open:
        digest = locate(options.model)[1]
        with run.stage("fit", **_asked(options)) as facts, processes.alone():
            plan = whole_plan(options, digest)
            candidates = _candidates(run.path, options, data, digest, lambda _: plan, progress)
            found = find_whole(candidates.fit.goals, backends_of(options), candidates.try_out)
            if found.trial is not None:
                _end(run, candidates, found, facts)
        if found.trial is None:
            run.forget("fit")
    processes.wait_for_all()
    fit = read(run.path / FIT, Fit, OutputError, AGAIN)
    return fit if fit.chosen is not None and fit.chosen.is_whole else None


@frees_memory
def fit_stage(run: RunFolder, options: FitOptions, data: Measured, progress: Progress) -> Fit | None:
    """Write `fit.json`, and the plan that was found as `plan.json`; None without targets. Every process calls it.

    Raises:
        InfeasibleBudgetError: nothing meets the targets; the message says what is best.
    """
    if not options.target:
        return None
    if run.writer and not _is_fitted(run, options):
        with run.stage("fit", **_asked(options)) as facts, processes.alone():
            order = Order.read(run.path / ORDER, OutputError, AGAIN)
            digest = order.plan.model_digest
            candidates = _candidates(run.path, options, data, digest, order.plan_at, progress)
            backends, foretell = backends_of(options), _foretelling(order, options, progress)
            costs, bound = split_goals(candidates.fit.goals)
            if bound is not None and not costs:
                found = find_smallest(bound, backends, candidates.try_out, foretell, order.plan.ratio)
            else:
                goals, told = candidates.fit.goals, dict.fromkeys(backends, foretell)
                found = find_cut(goals, backends, candidates.try_out, told, order.plan.ratio)
            _end(run, candidates, found, facts)
    processes.wait_for_all()
    return read(run.path / FIT, Fit, OutputError, AGAIN)


def _asked(options: FitOptions) -> dict[str, list[str]]:
    return {"targets": list(options.target), "backends": list(backends_of(options))}


def _is_fitted(run: RunFolder, options: FitOptions) -> bool:
    return run.finished("fit") and _asked(options).items() <= run.facts("fit").items()


def _back_to_the_ratio(run: RunFolder) -> None:
    """An earlier command had targets, this one has none: the plan is the one that was made."""
    if run.facts("fit"):
        run.forget("fit")
        if run.writer and run.finished("plan"):
            write_text(run.path / PLAN, Order.read(run.path / ORDER, OutputError, AGAIN).plan.to_json())
    processes.wait_for_all()


def _candidates(
    out: Path,
    options: FitOptions,
    data: Measured,
    digest: str,
    plan_at: Callable[[float], Plan],
    progress: Progress,
) -> Candidates:
    """Those of the dense weights with this digest; what an earlier process tried is known."""
    goals = read_goals(options.target)
    bench = Workbench(options.model, workload_of(options), split_goals(goals)[0], Losses(options, data))
    device = f"{describe_device(pick_device(options.device))['name']}, {torch.get_num_threads()} threads"
    fit = Fit(digest, data.digest, device, goals)
    fit = replace(fit, trials=_earlier(out / FIT, fit))
    wholes = len(backends_of(options))
    expected = wholes + (wholes if bench.goals else HALVINGS)
    return Candidates(out / FIT, plan_at, bench, fit, expected, progress)


def _end(run: RunFolder, candidates: Candidates, found: Found, facts: dict[str, Any]) -> None:
    """Write what was found, and its plan."""
    fit = candidates.end(found)
    if fit.chosen is not None:
        write_text(run.path / PLAN, candidates.plan_at(fit.chosen.ratio).to_json())
        facts.update(ratio=fit.chosen.ratio, backend=fit.chosen.backend, trials=len(fit.trials))


def delivered(options: Options, fit: Fit | None) -> Options:
    """The options with what was found: its format and precision are exported, what was not cut is not trained, and the
    target `drop` is the limit of quality.
    """
    if fit is None or fit.chosen is None:
        return options
    form, variant = split_backend(fit.chosen.backend)
    changes: dict[str, Any] = {"recover": "none"} if fit.chosen.is_whole else {}
    if form != TORCH:
        changes |= {"export": tuple(dict.fromkeys((form, *(options.export or ())))), "variants": (variant,)}
    if bound := split_goals(read_goals(options.target))[1]:
        changes["max_quality_drop"] = min(bound.amount, options.max_quality_drop or math.inf)
    return replace(options, **changes)


def workload_of(options: FitOptions) -> ProfileOptions:
    """What candidates run: a question about an image at a time, as the profile stage asks it first."""
    return ProfileOptions(
        slim=options.model,
        device=options.device,
        seed=options.seed,
        batch_sizes=(1,),
        cell_seconds=CELL_SECONDS,
        trust_remote_code=options.trust_remote_code,
    )


def _earlier(path: Path, now: Fit) -> tuple[Trial, ...]:
    """The candidates of the same order that an interrupted search, or one with other targets, tried on this device."""
    if not path.is_file():
        return ()
    fit = read(path, Fit, OutputError, f"remove {path} to try all candidates again")
    same = replace(now, goals=fit.goals, trials=fit.trials, chosen=fit.chosen) == fit
    return fit.trials if same else ()


def _foretelling(order: Order, options: FitOptions, progress: Progress) -> Foretell:
    """Bytes by the parameters that are left; times by the table that units were ranked by, else by the multiplications
    that are left in the towers.
    """
    table = groups = None
    if options.cost != "parameters":
        table = _table(options, progress)
        groups = find_groups(*build_meta(options.model, options.trust_remote_code))

    def foretell(ratio: float) -> Figures:
        plan = order.plan_at(ratio)
        seen, said = (
            float(
                sum(
                    count.macs_after
                    for name, count in plan.towers.items()
                    if (MODALITIES[name] == "vision") is of_images
                )
            )
            for of_images in (True, False)
        )
        left = float(plan.parameters_after)
        figures = {"params": left, "size": left, "memory": left, "vision": seen, "ttft": seen + said, "tpot": said}
        return figures if table is None or groups is None else {**figures, **table.predict(plan, groups)}

    return foretell
