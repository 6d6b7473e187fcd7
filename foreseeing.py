"""What a compression would do, before it does it: what is read and removed, how long that takes and in how much memory,
and what would be written.

Times are those of one batch on this device, measured after one to warm up, times how many there are; a cut model is
taken to be faster by as much as it is smaller. Of the refit one system of each size is solved. An export is as many
operations as are traced, a profile as many cells as it takes its time for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.data.collate import collated, collator_of
from slimvlm.compress.data.splits import Measured, Trained, steps_of
from slimvlm.compress.evaluation.evaluate import evaluate, evaluation_batch
from slimvlm.compress.evaluation.soundness import check_computes
from slimvlm.compress.files.folders import require_room
from slimvlm.compress.models.checkpoint import build_meta
from slimvlm.compress.models.computing import frees_memory, load_to_compute, stored_bytes
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import Group, count_parameters, find_groups
from slimvlm.compress.models.inspection import Inspection, inspect_model
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.progress import Progress
from slimvlm.compress.recovery.checks import recipe_of
from slimvlm.compress.rounds import Planning, round_share
from slimvlm.compress.runs import CUT, EXPORT, MODEL, TRAINING
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.slicing.refit import LEAST, MOST, cut_projections
from slimvlm.compress.stages.plan import planning_of
from slimvlm.compress.stages.stock_shape import tries_shapes
from slimvlm.compress.statistics.collect import bytes_kept, calibration_batch, collect
from slimvlm.compress.statistics.reading import Batches
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions
from slimvlm.compress.streaming.blocks import blocks_of
from slimvlm.export.options import ExportOptions
from slimvlm.export.packages import installed_formats
from slimvlm.export.variants import FULL, VARIANTS
from slimvlm.serve.costing.factors import fitted
from slimvlm.serve.measuring.device import launch_seconds
from slimvlm.serve.measuring.memory import held_bytes, peak_bytes, reset_peak
from slimvlm.serve.options import BACKENDS, ONNX, TORCH, ProfileOptions
from slimvlm.serve.stage import CELL_SECONDS

FORWARD = 1 / 3  # of a forward and a backward pass
TAUGHT_AT_ONCE = 4 * 2**30  # bytes that the learning of blocks may take at once, as recovery/blockwise has it
LEARNT_WITH = 4  # times its size lies in the file of a block that learns all its weights
TRAINED_BYTES = 12  # per trained parameter: its gradient and two moments in fp32
TRIED = 5  # at most: calibrated, learnt, evaluated, refitted twice
DECODER_TESTS = 2  # of every backend
DECIDED = 2 / 3  # of the seconds of a cell: many are decided sooner
LOOKS = 3  # at a model whose blocks alone learn: as it was cut, as it became, and merged
LOADS = 3  # what loading, saving and reading again in the slice stage take, in loads of the model


@dataclass(frozen=True)
class Step:
    """A stage: what it does, and about how many seconds; None: not foreseen. `done`: by an earlier process."""

    name: str
    does: str
    seconds: float | None
    done: bool = False


@dataclass(frozen=True)
class Foreseen:
    """What the run would be.

    Attributes:
        removed: parameters; where targets are to be met, at most so many.
        samples: who sees how many of them: calibration, evaluation, training, validation.
        held_out: no image is both calibrated on and evaluated with.
        bad: names of unreadable ones with the reason.
        calibration_bytes: peak memory of this process (on a GPU: of the device) in one batch of the calibration, its
            sums included; None where the system does not tell.
        recovery_bytes: of the recovery, from the sizes of weights and activations; None without one.
        files: folder of the run -> about how many bytes.
    """

    model: str
    out: str
    device: str
    inspection: Inspection
    removed: int
    fitted: bool
    samples: Mapping[str, int]
    held_out: bool
    bad: tuple[str, ...]
    steps: tuple[Step, ...]
    calibration_bytes: int | None
    recovery_bytes: int | None
    files: Mapping[str, int]

    @property
    def seconds(self) -> float:
        """Of all steps that are foreseen and not done."""
        return sum(step.seconds or 0 for step in self.steps if not step.done)


@dataclass(frozen=True)
class Pace:
    """What one batch took: seconds of a calibration batch of `size`, of a sample learnt from, and of one evaluated; of
    the refit for one sample that is read and for all that is solved; of loading the model, and of an operation.
    """

    size: int
    calibrated: float
    learnt: float
    evaluated: float
    read: float
    solved: float
    loaded: float
    launched: float
    linears: int
    peak: int | None
    held: int  # bytes before any batch, the model included
    weights: int  # bytes of the model
    stored: int  # bytes of a weight in its checkpoint
    activations: int  # bytes per sample that a backward pass needs
    blocks: int
    device: str


def foresee(
    options: CompressOptions, data: Measured, trained: Trained | None, done: Collection[str], progress: Progress
) -> Foreseen:
    """What `compress` would do with these options, which were checked, and these samples.

    Args:
        trained: None without a recovery.
        done: stages that an earlier process has finished.
    """
    planning = planning_of(options)
    inspection = inspect_model(options.model, options.attention_unit, options.trust_remote_code)
    pace = _pace(options, planning, data, trained is not None, progress)
    removed = round(options.ratio * inspection.parameters)
    read = {"calibration": len(data.calibration), "evaluation": len(data.evaluation)}
    if trained is not None:
        read |= {"training": len(trained.training), "validation": len(trained.validation)}
    return Foreseen(
        model=options.model,
        out=str(options.out),
        device=pace.device,
        inspection=inspection,
        removed=removed,
        fitted=bool(options.target),
        samples=read,
        held_out=data.held_out,
        bad=tuple(f"{bad.name}: {bad.reason}" for bad in (*data.bad, *(trained.bad if trained else ()))),
        steps=tuple(replace(step, done=step.name in done) for step in _steps(options, planning, data, trained, pace)),
        calibration_bytes=pace.peak if planning.calibration.statistics else None,
        recovery_bytes=None if trained is None else _recovery_bytes(options, inspection.parameters - removed, pace),
        files=written(options, inspection.parameters - removed, pace.stored),
    )


@frees_memory
def _pace(options: CompressOptions, planning: Planning, data: Measured, learns: bool, progress: Progress) -> Pace:
    """Load the model, and time one batch of everything that is done with many."""
    reset_peak()
    began = time.perf_counter()
    loaded = load_to_compute(options, options.model)
    load = time.perf_counter() - began
    model, collator, wanted = loaded.model, collator_of(loaded), planning.calibration
    check_computes(model, collator, data.calibration[0], options.model)
    size = calibration_batch(loaded, collator, data.calibration, wanted, options.batch_size)
    batch, held = collated(collator, data.calibration[:size], size), held_bytes().resident
    stored: Any = model.config.dtype  # a dtype once loaded
    told = iter(range(1, TRIED + 1))

    def seconds_of(work: Callable[[], object]) -> float:
        work()
        before = _now(model.device)
        work()
        progress("try one batch", next(told), TRIED)
        return _now(model.device) - before

    def collected(options: CalibrationOptions, groups: Sequence[Group]) -> float:
        return seconds_of(lambda: collect(model, loaded.family, groups, batch, options)) if options.statistics else 0.0

    calibrated = collected(wanted, planning.groups(model))
    peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else peak_bytes()
    groups, gate = find_groups(model, loaded.family), CRITERIA["gate"].calibration()
    asked = evaluation_batch(model.device, options.batch_size)
    questions = data.evaluation[:asked]
    evaluated = seconds_of(lambda: evaluate(model, collator, questions, batch_size=asked)) / len(questions)
    read, solved = _refitted(model, loaded.family, groups, options, batch, seconds_of)
    return Pace(
        size=size,
        calibrated=calibrated,
        learnt=collected(gate, groups) / len(data.calibration[:size]) if learns else 0.0,
        evaluated=evaluated,
        read=read / len(data.calibration[:size]),
        solved=solved,
        loaded=load,
        launched=launch_seconds(model.device),
        linears=sum(isinstance(module, nn.Linear) for module in model.modules()),
        peak=peak,
        held=held,
        weights=sum(weight.numel() * weight.itemsize for weight in model.parameters()),
        stored=stored.itemsize,
        activations=bytes_kept(model, loaded.family, groups, batch[0](), gate) // len(data.calibration[:size]),
        blocks=len(blocks_of(model, loaded.family)),
        device=str(model.device),
    )


def _refitted(
    model: PreTrainedModel,
    family: Family,
    groups: Sequence[Group],
    options: CompressOptions,
    batch: Batches,
    seconds_of: Callable[[Callable[[], object]], float],
) -> tuple[float, float]:
    """Seconds of one reading of `batch` for the refit, and of solving for all projections, by one of each size."""
    fit = COMPENSATIONS[options.compensation]
    if fit.place is None:
        return 0.0, 0.0
    scores = score_groups(groups, CRITERIA["random"], seed=options.seed)
    keep = plan_units(groups, scores, Budget(ratio=options.ratio), facts_of(model, groups)).keep
    first = list({(group.tower, group.kind, group.size): group for group in reversed(groups)}.values())
    work, tried = (_solving(model, family, some, keep) for some in (groups, first))
    least = min(first, key=lambda group: group.size * group.head_dim)  # next to nothing is solved
    one = seconds_of(lambda: fit(model, family, [least], keep, batch))
    all_sizes = seconds_of(lambda: fit(model, family, first, keep, batch))
    readings = -(-work[1] // min(MOST, max(LEAST, count_parameters(model))))
    return readings * one, max(0.0, all_sizes - one) * work[0] / tried[0]


def _solving(
    model: PreTrainedModel, family: Family, groups: Sequence[Group], keep: Mapping[str, Sequence[int]]
) -> tuple[int, int]:
    """(operations, up to a factor; bytes of sums) of the refit of the output projections of these groups."""
    sides, _ = cut_projections(model, family, groups, keep)
    shapes = [side.module.weight.shape for side in sides]
    return sum(inner**2 * (inner + width) for width, inner in shapes), sum(4 * inner**2 for _, inner in shapes)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _steps(
    options: CompressOptions, planning: Planning, data: Measured, trained: Trained | None, pace: Pace
) -> Iterator[Step]:
    left = 1 - options.ratio
    if planning.calibration.statistics:
        batches = -(-len(data.calibration) // pace.size)
        # Each round looks at the model as cut so far.
        before = [0.0, *(round_share(number, planning.rounds, planning.power) for number in range(1, planning.rounds))]
        looked = sum(1 - options.ratio * share for share in before) + bool(planning.depth)
        backward = any(STATISTICS[name].reads == "backward" for name in planning.calibration.statistics)
        how = "forward and backward" if backward else "forward"
        does = f"{_many(planning.steps, 'round')} of {_many(batches, 'batch')} of {pace.size}, {how}"
        besides = "" if planning.asks is None else f"; besides what --allocator {options.allocator} asks, not foreseen"
        besides += "; besides the shapes that are tried, not foreseen" if tries_shapes(planning) else ""
        sizes = [1 - options.ratio * share for share in before[1:] if COMPENSATIONS[planning.between].place]
        between = sum(size * len(data.calibration) * pace.read + size**2 * pace.solved for size in sizes)
        yield Step("plan", does + besides, pace.loaded + looked * batches * pace.calibrated + between)
    else:
        yield Step("plan", f"{options.criterion} reads no samples", 0.0)
    if options.target:
        yield Step("fit", "cuts are tried until one meets the targets", None)
    fits = COMPENSATIONS[options.compensation].place is not None
    does = f"{options.compensation}: what is left is fitted to the dense outputs" if fits else "cut, saved and checked"
    yield Step("slice", does, LOADS * pace.loaded + len(data.calibration) * pace.read + pace.solved)
    if trained is not None:
        yield _recovery(options, trained, pace, left)
    models = 2 + left * (1 + (trained is not None))
    names = "dense, with the images shuffled" + (", cut" if trained is not None else "") + ", slim"
    yield Step("evaluate", f"{len(data.evaluation)} questions: {names}", models * len(data.evaluation) * pace.evaluated)
    if formats := _formats(options):
        graphs = sum(len(options.variants) or 1 if form == ONNX else 1 for form in formats)
        traced = fitted()["seconds"]["trace"] * pace.linears * pace.launched
        checked = ExportOptions.samples * pace.evaluated * left
        seconds = pace.loaded + len(formats) * traced + graphs * checked
        yield Step("export", f"{', '.join(formats)}, each checked against torch", seconds)
    if options.profile:
        run = {
            form: len(options.variants) or 1 if form == ONNX else 1 for form in (TORCH, *formats) if form in BACKENDS
        }
        cells = sum(run.values()) * (len(ProfileOptions.batch_sizes) + DECODER_TESTS)
        starting = ProfileOptions.starts * (1 + left) * pace.loaded
        yield Step(
            "profile", "latency and memory of both models, in turns", cells * (DECIDED * CELL_SECONDS + starting)
        )


def _recovery(options: CompressOptions, trained: Trained, pace: Pace, left: float) -> Step:
    """Blocks that learn by themselves are shown what the whole would be, and are judged by what they miss of that."""
    recipe, steps, held_out = recipe_of(options), steps_of(options, trained), len(trained.validation)
    taught = FORWARD if recipe.needs_teacher else 0.0
    seconds = steps * options.train_batch_size * pace.learnt * (left + taught)
    validations, alone = trained.validations + 2 if recipe.whole else LOOKS, ""
    if by_block := recipe.block_steps(steps):
        alone = f", {by_block:,} of them by every block alone"
        seconds += (trained.validations + 1) * held_out * FORWARD * pace.learnt * (left + 1)
    does = f"{_many(steps, 'step')} of {options.train_batch_size}{alone}, {validations} validations of {held_out}"
    return Step("recover", does, seconds + validations * held_out * pace.evaluated * left)


def _many(number: int, thing: str) -> str:
    plural = "es" if thing.endswith("ch") else "s"
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def _formats(options: CompressOptions) -> tuple[str, ...]:
    return installed_formats() if options.export is None else options.export


def _recovery_bytes(options: CompressOptions, left: int, pace: Pace) -> int:
    """Both models, the activations of a part of a batch, and the optimiser's state where all weights are trained; where
    blocks alone learn, of one of them, and of as many as learn at once.
    """
    recipe = recipe_of(options)
    slim = round(pace.weights * (1 - options.ratio))
    teacher = 0 if recipe.needs_teacher else -pace.weights
    part = -(-options.train_batch_size // options.accumulate)
    state = TRAINED_BYTES * left if options.train == "full" else 0
    activations = part * pace.activations
    if not recipe.whole:
        activations, state = activations // pace.blocks, min(state, TAUGHT_AT_ONCE)
    return pace.held + teacher + slim + activations + state


def written(options: CompressOptions, left: int, stored: int) -> dict[str, int]:
    """Folder of the run -> about how many bytes; `left` parameters of a model stored in so many bytes each."""
    found = {MODEL: left * stored}
    if options.recover != "none":
        found[CUT] = left * stored
        if recipe_of(options).block_share and options.train == "full":
            found[TRAINING] = LEARNT_WITH * left * stored
    for form in _formats(options):
        precisions = (options.variants or (FULL,)) if form == "onnx" else (FULL,)
        found |= {
            f"{EXPORT} ({form}{f', {name}' if form == 'onnx' else ''})": round(left * VARIANTS[name].weight_bytes)
            for name in precisions
        }
    return found


def check_room(options: CompressOptions) -> None:
    """Refuse a run that the disk has no room for.

    Raises:
        OutputError: it has not.
    """
    model, _ = build_meta(options.model, options.trust_remote_code)
    left = round((1 - options.ratio) * count_parameters(model))
    require_room(options.out, sum(written(options, left, stored_bytes(model)).values()))
