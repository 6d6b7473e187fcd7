"""A job of its own: single weights become zero, the shapes stay, and the checkpoint is written and checked."""

from __future__ import annotations

from dataclasses import asdict, replace

from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.data.collate import collated, collator_of
from slimvlm.compress.data.splits import read_evaluation
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.evaluation.equality import CHECKED_SAMPLES, reload_difference
from slimvlm.compress.evaluation.soundness import check_computes
from slimvlm.compress.files.decoding import read
from slimvlm.compress.files.folders import refuse_inside, require_free, require_room
from slimvlm.compress.models.checkpoint import PLAN, build_meta, weight_sizes
from slimvlm.compress.models.computing import as_stored, cast, frees_memory, load_to_compute
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.options import LAYOUTS, SparsifyOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.sparsity.rules import PATTERNS, RECORD, RULES
from slimvlm.compress.sparsity.sparsify import Asked, Sparsified, sparsify
from slimvlm.compress.stages.slice import BESIDE
from slimvlm.compress.statistics.by_block import check_by_block
from slimvlm.compress.statistics.pools import check_pool
from slimvlm.compress.statistics.rows import token_rule

RATIO = 0.35  # where none is given


@frees_memory
def sparsify_model(options: SparsifyOptions, progress: Progress = silent) -> Sparsified:
    """Write `options.model` with zeros to `options.out`: dense tensors, loaded by the unmodified class.

    Raises:
        UnsuitableOptionError: options that contradict each other, a pattern that a width does not allow, or an
            allocator that needs the whole model, which is streamed.
        InfeasibleBudgetError, SampleError, CalibrationError, OutputError: as their names say.
        CheckFailedError: the checkpoint does not give what was saved.
    """
    asked = asked_of(options)
    require_free(options.out)
    refuse_inside(options.out, {"model": options.model, "data": options.data})
    meta, _ = build_meta(options.model, options.trust_remote_code)
    groups = find_groups(meta, find_family(meta.config))
    check_pool(asked.tokens, find_family(meta.config), meta.config)
    asked.zeros(meta, groups, dict.fromkeys((group.key for group in groups), 1.0))
    if options.stream == "on" and (asks := ALLOCATORS[asked.allocator].asks):
        check_by_block([asks])
    require_room(options.out, sum(weight_sizes(options.model).values()))
    samples = read_evaluation(replace(options, eval_samples=options.samples))
    loaded = load_to_compute(options, options.model, beside=BESIDE)
    model, collator = loaded.model, collator_of(loaded)
    if weights := streamed(model):
        weights.require_room(model.parameters())
    check_computes(model, collator, samples[0], options.model)
    done = sparsify(model, loaded.family, collated(collator, samples, options.batch_size), asked, progress)
    setattr(model.config, RECORD, asdict(done))
    computed = model.dtype
    earlier = loaded.folder / PLAN  # of a model that was cut before
    plan = read(earlier, Plan) if earlier.is_file() else None
    save_checkpoint(options.out, as_stored(model), loaded.processor, plan, plan.layout if plan else LAYOUTS[0])
    reloaded = load_to_compute(options, str(options.out), beside=BESIDE).model
    reload_difference(cast(model, computed), reloaded, collator.training(samples[:CHECKED_SAMPLES]), options.out)
    return done


def asked_of(options: SparsifyOptions) -> Asked:
    """The options in the library's terms.

    Raises:
        UnsuitableOptionError: they contradict each other, or one is unknown.
    """
    allocators = [name for name, row in ALLOCATORS.items() if name == "local" or row.asks]
    for name, known in (("sparsity", PATTERNS), ("rule", RULES), ("allocator", allocators)):
        if (value := getattr(options, name)) not in known:
            raise UnsuitableOptionError(f"{name} {value!r} is unknown here; choose one of {', '.join(known)}")
    given = {"ratio": options.ratio is not None, "allocator": options.allocator != "local"}
    if PATTERNS[options.sparsity] is not None and (said := [name for name, there in given.items() if there]):
        raise UnsuitableOptionError(
            f"--{said[0]} has no say with --sparsity {options.sparsity}, which takes the same share of every matrix; "
            "leave it out, or use --sparsity unstructured"
        )
    ratio = RATIO if options.ratio is None else options.ratio
    return Asked(options.sparsity, ratio, options.rule, options.allocator, options.seed, token_rule(options.tokens))
