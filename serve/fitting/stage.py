"""The fit stage of a run: the beginning of its order of removal, and the precision, that meet the targets of cost.

`fit.json` holds every candidate as soon as it was tried: a killed search asks for the same ones again, and finds them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from slimvlm.compress import processes
from slimvlm.compress.allocate.costs import Times
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.errors import OutputError, UnsuitableOptionError
from slimvlm.compress.files.decoding import dump, read
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.models.checkpoint import build_meta
from slimvlm.compress.models.computing import frees_memory
from slimvlm.compress.models.families import FAMILIES
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.options import FitOptions
from slimvlm.compress.processes import pick_device
from slimvlm.compress.progress import Progress
from slimvlm.compress.runs import AGAIN, FIT, ORDER, PLAN, RunFolder
from slimvlm.export.packages import require_packages
from slimvlm.export.variants import FULL, VARIANTS
from slimvlm.serve.fitting.goals import MILLISECONDS, Goal, read_goals
from slimvlm.serve.fitting.record import Figures, Fit, Trial
from slimvlm.serve.fitting.search import MOST_TRIALS, find_cut
from slimvlm.serve.fitting.tabulate import cached_table
from slimvlm.serve.fitting.trials import Workbench
from slimvlm.serve.measuring.device import describe_device
from slimvlm.serve.options import TORCH, ProfileOptions, split_backend
from slimvlm.serve.targets import graph_options

Options = TypeVar("Options", bound=FitOptions)
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
    if not [goal for goal in read_goals(options.target) if goal.name != "drop"]:
        raise UnsuitableOptionError("--target drop alone says nothing of cost; add a target as size=3MB or tpot=15ms")
    backends = backends_of(options)
    if backends != (TORCH,):
        require_packages(graph_options(backends).checked())


def backends_of(options: FitOptions) -> tuple[str, ...]:
    """The precisions to choose among, the most exact first."""
    if options.backend == TORCH:
        if options.variants:
            raise UnsuitableOptionError("--variants are of exported graphs; leave it out, or use --backend onnx")
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
    table = cached_table(Workbench(options.model, workload_of(options)), backends_of(options)[-1], progress=progress)
    if missing := [goal.name for goal in goals if goal.name not in table.dense]:
        raise UnsuitableOptionError(
            f"--target {missing[0]}: this model has no such time here; it has {', '.join(table.dense)}"
        )
    model, family = build_meta(options.model, options.trust_remote_code)
    return table.times(find_groups(model, family), {goal.name: goal.amount for goal in goals})


def _times(options: FitOptions) -> list[Goal]:
    return [goal for goal in read_goals(options.target) if goal.quantity.units is MILLISECONDS]


@frees_memory
def fit_stage(run: RunFolder, options: FitOptions, progress: Progress) -> Fit | None:
    """Write `fit.json`, and the plan that was found as `plan.json`; None without targets. Every process calls it.

    Raises:
        InfeasibleBudgetError: nothing meets the targets; the message says what is best.
    """
    if not options.target:
        return None
    path, asked = run.path / FIT, {"targets": list(options.target), "backends": list(backends_of(options))}
    if run.writer and not (run.finished("fit") and asked.items() <= run.facts("fit").items()):
        run.forget("slice")
        with run.stage("fit", **asked) as facts:
            order = Order.read(run.path / ORDER, OutputError, AGAIN)
            fit = _fit(order, options, path, progress)
            if fit.chosen is not None:
                write_text(run.path / PLAN, order.plan_at(fit.chosen.ratio).to_json())
                facts.update(ratio=fit.chosen.ratio, backend=fit.chosen.backend, trials=len(fit.trials))
    processes.wait_for_all()
    return read(path, Fit, OutputError, AGAIN)


def _fit(order: Order, options: FitOptions, path: Path, progress: Progress) -> Fit:
    """The search, with its file written after every candidate."""
    goals = tuple(goal for goal in read_goals(options.target) if goal.name != "drop")
    wanted, backends, plan = {goal.name for goal in goals}, backends_of(options), order.plan
    bench = Workbench(options.model, workload_of(options))
    device = f"{describe_device(pick_device(options.device))['name']}, {torch.get_num_threads()} threads"
    fit = Fit(plan.model_digest, plan.calibration_digest, device, goals)
    fit = replace(fit, trials=_earlier(path, fit))

    def try_out(ratio: float, backend: str) -> Trial:
        nonlocal fit
        for trial in fit.trials:
            if (trial.ratio, trial.backend) == (ratio, backend) and wanted <= set(trial.figures):
                return trial
        progress("fit", len(fit.trials), MOST_TRIALS * len(backends), f"{backend}, {ratio:.1%} removed")
        trial = bench.try_out(order.plan_at(ratio), ratio, backend, wanted)
        fit = replace(fit, trials=(*fit.trials, trial))
        write_text(path, dump(asdict(fit), indent=1, sort_keys=True) + "\n")
        return trial

    foretold = partial(_foretell, order)
    found = find_cut(goals, backends, try_out, dict.fromkeys(backends, foretold), plan.ratio)
    progress("fit", 1, 1)
    fit = replace(fit, trials=found.trials, chosen=found.trial)
    write_text(path, dump(asdict(fit), indent=1, sort_keys=True) + "\n")
    return fit


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
    if drop := [goal.amount for goal in read_goals(options.target) if goal.name == "drop"]:
        changes["max_quality_drop"] = min(drop[0], options.max_quality_drop or math.inf)
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


def _foretell(order: Order, ratio: float) -> Figures:
    """Bytes by the parameters that are left, times by the multiplications that are left in the towers."""
    plan = order.plan_at(ratio)
    family = next(family for family in FAMILIES if family.name == plan.family)
    images = {tower.name for tower in family.towers if tower.modality == "vision"}
    seen, said = (
        float(sum(count.macs_after for name, count in plan.towers.items() if (name in images) is of_images))
        for of_images in (True, False)
    )
    left = float(plan.parameters_after)
    return {"params": left, "size": left, "memory": left, "vision": seen, "ttft": seen + said, "tpot": said}
