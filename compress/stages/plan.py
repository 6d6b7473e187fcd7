"""The plan stage of a run: `plan.json`, `order.safetensors` and `scores.safetensors`; a killed one continues after its
last round.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from slimvlm.compress import processes
from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.costs import Times
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.criteria.criterion import CRITERIA, Criterion
from slimvlm.compress.criteria.scoring import Scores, score_groups
from slimvlm.compress.data.collate import Collator, collated, collator_of
from slimvlm.compress.data.splits import Measured
from slimvlm.compress.errors import CheckpointError, OutputError, UnsuitableOptionError
from slimvlm.compress.evaluation.soundness import check_computes
from slimvlm.compress.files.decoding import read
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.models.checkpoint import build_meta, config_folder
from slimvlm.compress.models.computing import bytes_to_compute, frees_memory, is_to_be_streamed, load_to_compute
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters
from slimvlm.compress.models.loaders import load_processor
from slimvlm.compress.models.streaming.scratch import require_scratch
from slimvlm.compress.models.streaming.weights import HELD
from slimvlm.compress.options import PlanOptions
from slimvlm.compress.plan import BLOCK, Compensating, Plan
from slimvlm.compress.processes import pick_device
from slimvlm.compress.progress import Progress
from slimvlm.compress.rounds import Planned, Planning, check_budget, plan_in_rounds, score_units
from slimvlm.compress.runs import AGAIN, ORDER, PLAN, ROUNDS, SCORES, RunFolder
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.slicing.guard import STREAMED
from slimvlm.compress.stages.stock_shape import tries_shapes, with_stock_shape
from slimvlm.compress.statistics.by_block import check_by_block
from slimvlm.compress.statistics.collect import ACTIVATIONS, calibration_batch, importance_of
from slimvlm.compress.statistics.collectors.gradients import MATRICES
from slimvlm.compress.statistics.pools import check_pool
from slimvlm.compress.statistics.rows import ALL, POORLY_FITTED, STATISTICS, token_rule
from slimvlm.compress.streaming import pages
from slimvlm.compress.streaming.room import refitted_bytes, waiting_bytes


def chosen_criterion(options: PlanOptions) -> Criterion:
    """The criterion with the asked ablations applied.

    Raises:
        UnsuitableOptionError: an ablation of a criterion that does not have what it changes.
    """
    criterion = CRITERIA[options.criterion]
    if options.taylor is not None and criterion.statistics != ("first",):
        raise UnsuitableOptionError(
            f"--taylor {options.taylor} is a variant of the criteria ukmi or taylor, not of {criterion.name}; "
            "choose one of them with --criterion, or leave --taylor out"
        )
    ablations = [name for name in ("threshold", "entropy") if getattr(options, name) is not None]
    if ablations and not criterion.statistics:
        raise UnsuitableOptionError(
            f"--{ablations[0]} changes which tokens count, and {criterion.name} sees none: it scores without samples; "
            f"choose another --criterion, or leave --{ablations[0]} out"
        )
    if options.threshold is not None and not criterion.learns:
        raise UnsuitableOptionError(
            f"--threshold changes which answers give a gradient, and {criterion.name} takes none; "
            "choose another --criterion, or leave --threshold out"
        )
    tokens = criterion.tokens if options.tokens is None else token_rule(options.tokens)
    if tokens != criterion.tokens and (criterion.learns or not criterion.statistics):
        forward = ", ".join(name for name, row in CRITERIA.items() if row.statistics and not row.learns)
        raise UnsuitableOptionError(
            f"--tokens {options.tokens} is for criteria that need a forward alone ({forward}), and {criterion.name} "
            f"{'takes gradients' if criterion.learns else 'sees no tokens'}; choose one of them, or leave --tokens out"
        )
    if options.threshold is not None:
        tokens = ALL if options.threshold >= 1 else replace(POORLY_FITTED, threshold=options.threshold)
    entropy = criterion.angles is not None if options.entropy is None else options.entropy
    statistics = criterion.statistics if options.taylor is None else (options.taylor,)
    return replace(criterion, statistics=statistics, tokens=tokens, angles=options.angles if entropy else None)


def planning_of(options: PlanOptions, times: Times | None = None) -> Planning:
    """The options of the plan stage in the library's terms, and the measured times that units are ranked by.

    Raises:
        UnsuitableOptionError: they contradict each other.
    """
    between = COMPENSATIONS[options.compensation].between if options.compensate_rounds else "none"
    return Planning(
        budget=Budget(
            ratio=options.ratio,
            tower_ratio=dict(options.tower_ratio),
            kind_ratio=dict(options.kind_ratio),
            round_channels=options.round_channels,
            allocator=options.allocator,
            times=times,
            layout=options.layout,
        ),
        criterion=chosen_criterion(options),
        grad_memory_bytes=options.grad_memory,
        host_sums=options.host_sums,
        rounds=options.rounds,
        power=1.0 if options.equal_rounds else Planning.power,
        depth=dict(options.depth_ratio),
        between=between,
        guard=options.guard,
        attention_unit=options.attention_unit,
        seed=options.seed,
    )


def whole_plan(options: PlanOptions, model_digest: str) -> Plan:
    """The plan that removes nothing but dead blocks, as the beginning of every order does: no sample is asked."""
    planning = planning_of(options)
    model, _ = build_meta(options.model, options.trust_remote_code)
    groups = planning.groups(model)
    nothing = Budget(ratio=0.0, layout=options.layout)
    plan = plan_units(groups, score_groups(groups, CRITERIA["random"]), nothing, facts_of(model, groups))
    return replace(
        plan,
        model_digest=model_digest,
        criterion=options.criterion,
        allocator=options.allocator,
        attention_unit=options.attention_unit,
        seed=options.seed,
    )


def check_plan(options: PlanOptions) -> None:
    """Refuse what no calibration can mend: a model that is not there or that cannot lose so much.

    Raises:
        SlimvlmError: with the reason.
    """
    pick_device(options.device)
    planning = planning_of(options)
    if options.cost != "parameters" and (planning.depth or planning.criterion.units == BLOCK):
        raise UnsuitableOptionError(
            f"--cost {options.cost} is of widths, and --depth-ratio or the criterion influence takes whole blocks; "
            "choose another --criterion, or leave --depth-ratio out"
        )
    if planning.asks and options.stream == "on":
        check_by_block(planning.asks.statistics)
    if planning.guard and options.stream == "on":
        raise UnsuitableOptionError(STREAMED)
    model, _ = build_meta(options.model, options.trust_remote_code)
    _check_biases(model, planning, options)
    check_pool(planning.criterion.tokens, find_family(model.config), model.config)
    check_budget(model, planning)


def check_waiting(options: PlanOptions, data: Measured) -> None:
    """Refuse a plan of a streamed model of which what is put away meanwhile has no room, by shapes and one sample: no
    weights are read.

    Raises:
        OutputError: so it is.
    """
    planning, device = planning_of(options), pick_device(options.device)
    needed = bytes_to_compute(options, options.model, _beside(planning))
    if not is_to_be_streamed(options.stream, needed, str(device)):
        return
    model, family = build_meta(options.model, options.trust_remote_code)
    itemsize = round(bytes_to_compute(options, options.model, 0) / count_parameters(model))
    wanted = 0
    if statistics := planning.calibration.statistics:
        processor = load_processor(config_folder(options.model), options.trust_remote_code)
        batch = Collator(processor, family, model.config).training(data.calibration[:1])
        learning = any(STATISTICS[name].reads == "backward" for name in statistics)
        each = waiting_bytes(model, family, batch, learning, itemsize)
        wanted += max(0, each * len(processes.share(len(data.calibration))) - pages.KEPT)
    if COMPENSATIONS[options.compensation].between != "none":
        wanted += max(0, refitted_bytes(model, family, itemsize) - HELD)
    require_scratch(wanted)


@frees_memory
def dense_scores(options: PlanOptions, data: Measured, progress: Progress) -> Scores:
    """What the units of the dense model are worth: what the first round of any plan with this criterion, and an
    allocator that asks the same, begins with.
    """
    planning = planning_of(options)
    check_waiting(options, data)
    loaded = load_to_compute(options, options.model, beside=_beside(planning))
    collator = collator_of(loaded)
    check_computes(loaded.model, collator, data.calibration[0], options.model)
    size = calibration_batch(loaded, collator, data.calibration, planning.calibration, options.batch_size)
    work = (loaded.model, planning.groups(loaded.model), lambda: collated(collator, data.calibration, size))
    importance = importance_of(*work, planning.asks, progress)
    return replace(score_units(*work, planning, progress), importance=importance)


def _beside(planning: Planning) -> float:
    """Bytes per weight that planning takes beside the weights: activations and the refit's sums, those that cuts
    which are tried hold, and those of gradients.
    """
    matrices = max((MATRICES.get(name, 0) for name in planning.calibration.statistics), default=0)
    return ACTIVATIONS + 1 + (planning.guard or tries_shapes(planning)) + 4 * matrices


def _check_biases(model: nn.Module, planning: Planning, options: PlanOptions) -> None:
    """Refuse biases that the unmodified class has not."""
    if options.layout != "stock" or COMPENSATIONS[options.compensation].stand_in is None:
        return
    for group in planning.groups(model):
        output = group.members[-1].path if group.members and group.part.fields else None
        if output is not None and model.get_submodule(output).bias is None:
            raise UnsuitableOptionError(
                f"--compensation {options.compensation} gives {output} a bias, and with --layout stock the unmodified "
                "class has none there; choose another compensation, or --layout per-layer"
            )


@frees_memory
def plan_stage(
    run: RunFolder,
    options: PlanOptions,
    data: Measured,
    progress: Progress,
    times: Times | None = None,
    known: Scores | None = None,
) -> Plan:
    """The plan of this or an earlier process, by measured `times` and by `dense_scores` that are known, where there are
    some. Every process calls it.
    """
    path = run.path / PLAN
    if run.finished("plan"):
        return read(path, Plan, OutputError, AGAIN)
    partial = run.path / ROUNDS
    with run.stage("plan") as facts:
        planning = replace(planning_of(options, times), known=known)
        check_waiting(options, data)
        loaded = load_to_compute(options, options.model, beside=_beside(planning))
        collator = collator_of(loaded)
        check_computes(loaded.model, collator, data.calibration[0], options.model)
        done = (
            Order.read(partial, OutputError, f"remove {partial} to plan from the start") if partial.is_file() else None
        )
        size = calibration_batch(loaded, collator, data.calibration, planning.calibration, options.batch_size)
        batches = collated(collator, data.calibration, size)
        planning = with_stock_shape(loaded.model, batches, planning, done, progress)

        def keep(planned: Planned) -> None:
            if len(planned.order.rounds) < planning.steps and run.writer:
                planned.order.save(partial)

        planned = plan_in_rounds(
            loaded.model,
            lambda _: batches,
            planning,
            done=done,
            on_round=keep,
            progress=progress,
        )
        how = Compensating(
            options.compensation, options.samples, options.eval_samples, options.prefix_split, options.batch_size
        )
        plan = replace(
            planned.plan,
            model_digest=loaded.digest,
            calibration_digest=data.digest,
            compensation=how if COMPENSATIONS[how.name].place else None,
        )
        facts.update(model_digest=loaded.digest, data_digest=data.digest, calibration_samples=len(data.calibration))
        facts.update(left_out_samples=data.left_out, batch_size=size)
        facts["bad_samples"] = [f"{bad.name}: {bad.reason}" for bad in data.bad]
        if run.writer:
            planned.scores.save(run.path / SCORES)
            replace(planned.order, plan=plan).save(run.path / ORDER)
            write_text(path, plan.to_json())
            partial.unlink(missing_ok=True)
    processes.wait_for_all()
    return plan


def read_plan(path: Path, ratio: float | None = None) -> Plan:
    """The plan in the file `path`; for a smaller `ratio` its beginning, by the order that lies beside it.

    Raises:
        CheckpointError: a file is missing or damaged, or the order is another plan's.
        UnsuitableOptionError: `ratio` is more than the plan's.
    """
    plan = read(path, Plan, advice="make the plan again")
    if ratio in (None, plan.ratio):
        return plan
    advice = f"leave --ratio out, or put the {ORDER} of the plan beside it"
    order = Order.read(path.with_name(ORDER), advice=advice)
    if order.plan != plan:
        raise CheckpointError(f"{path.with_name(ORDER)} is of another plan than {path}; {advice}")
    return order.plan_at(ratio)
