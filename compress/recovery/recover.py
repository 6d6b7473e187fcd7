"""The recovery of one cut model: what is trained, by which recipe, on which samples; merged into dense weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from slimvlm.compress.data.collate import Batch, collator_of
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.data.splits import Trained, steps_of
from slimvlm.compress.errors import CheckFailedError, CheckpointError, UnsuitableOptionError
from slimvlm.compress.evaluation.equality import CHECKED_SAMPLES, TOLERANCE, outputs, relative_error
from slimvlm.compress.models.checkpoint import Loaded, locate
from slimvlm.compress.models.computing import ComputedIn, as_stored, attend_as, cast, load_to_compute
from slimvlm.compress.models.projections import resolve
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.options import NOT_GIVEN, LearnOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import Progress
from slimvlm.compress.recovery.adapters.frozen import freeze
from slimvlm.compress.recovery.adapters.recall import attach, merge
from slimvlm.compress.recovery.adapters.rounding import rounded
from slimvlm.compress.recovery.adapters.slices import Slices
from slimvlm.compress.recovery.blockwise.lessons import lessons_of
from slimvlm.compress.recovery.blockwise.pupil import Learnt
from slimvlm.compress.recovery.checks import learns_whole, recipe_of, require_projector
from slimvlm.compress.recovery.distillation.recipe import Recipe
from slimvlm.compress.recovery.distillation.teacher_checks import check_family, check_teacher
from slimvlm.compress.recovery.learning import Work, followed
from slimvlm.compress.recovery.training.choice import as_good_as
from slimvlm.compress.recovery.training.history import History
from slimvlm.compress.recovery.training.state import load_best, restore
from slimvlm.compress.recovery.training.workers import sharded

# Adam's best rate falls with the width: the rate is this over the hidden size of the language model. Tuned on the
# validation split of the demo set; at a hidden size of 4096 it gives the 1e-4 (LoRA) and 2e-5 (all) of common practice.
RATE_TIMES_WIDTH = {"lora": 0.5, "projector": 0.5, "lora+projector": 0.5, "full": 0.1}
EAGER_TOKENS = 512  # on a CPU, eager attention is the faster one to train with up to about so many tokens


@dataclass(frozen=True)
class Recovered:
    """The merged model (in the dtype it was computed in; `config.dtype` is the stored one) and how it got there.

    Attributes:
        blocks: what each block learnt by itself, where they did.
    """

    loaded: Loaded
    history: History
    merged_difference: float
    blocks: Sequence[Learnt] = ()


def recover(
    options: LearnOptions, plan: Plan, student: Path, data: Trained, folder: Path, progress: Progress
) -> Recovered:
    """Train the cut checkpoint `student` as the options say, and merge what was learnt into its weights.

    Args:
        plan: what was cut from `options.model`.
        folder: where checkpoints of the training and `recovery.jsonl` go; training continues from what is there.
            The teacher's outputs are kept beside it.

    Raises:
        UnsuitableOptionError: options that do not fit each other or this model.
        CheckpointError: the dense model or the teacher is not of the student's family and shape.
        RecoveryError: the loss was not finite ten times in a row.
        CheckFailedError: merging changed the outputs.
    """
    recipe = recipe_of(options)
    if sharded():  # no device holds the whole models
        options = replace(options, device="cpu")
        _check_sharded(options, recipe)
    loaded = _load_student(options, student, data)
    options = _settled(options, recipe, loaded, data)
    teacher = _load_teacher(options, plan, loaded, recipe) if recipe.needs_teacher else None
    lessons = lessons_of(loaded.model, teacher, loaded.family, plan.blocks) if teacher and recipe.block_share else []
    adapted = _prepare(options, plan, loaded)
    if adapted is not None and (weights := streamed(loaded.model)):  # what low-rank layers are merged into
        weights.require_room(loaded.model.parameters())
    work = Work(options, recipe, loaded, teacher, data, folder, progress)
    with rounded(loaded.model, options.recover_as):
        blocks, learnt = work.teach_blocks(lessons) if recipe.block_share else (None, [])
        history = work.train(plan, blocks) if recipe.whole else blocks or History()
    if any(isinstance(parameter, DTensor) for parameter in loaded.model.parameters()):  # FSDP leaves it in pieces
        loaded = _load_student(options, student, data)
        adapted = _prepare(options, plan, loaded)
        load_best(loaded.model, folder)
    elif options.frozen and adapted is not None and history.helped:
        loaded, adapted = _float_again(replace(options, frozen=None), plan, work, student)
    elif not history.helped and (options.frozen or not recipe.whole):  # a training takes back itself what did not help
        loaded, adapted = _load_student(options, student, data), None
    difference = _merge(loaded, adapted, work.collator.training(data.training[:CHECKED_SAMPLES]))
    if history.helped and history.first_least and not sharded():  # on the host it would take hours
        _round(loaded)
        with rounded(loaded.model, options.recover_as):
            merged = work.judge(loaded.model)
        if not as_good_as(merged.score, history.first_least):
            loaded, history = _load_student(options, student, data), replace(history, best_step=0)
    return Recovered(loaded, history, difference, learnt)


def _check_sharded(options: LearnOptions, recipe: Recipe) -> None:
    """Raises UnsuitableOptionError for what FSDP, which takes blocks and weights apart, cannot do."""
    asked = [name for name, wanted in (("blockwise", recipe.block_share), ("--frozen", options.frozen)) if wanted]
    if asked:
        raise UnsuitableOptionError(
            f"{asked[0]} needs whole blocks, and accelerate's configuration shards them (FSDP); start it by torchrun "
            "without that configuration, or leave it out"
        )


def _float_again(options: LearnOptions, plan: Plan, work: Work, student: Path) -> tuple[Loaded, PeftModel | None]:
    """A fresh student, its weights in floating point, with what the one of `work` has learnt."""
    learnt = {name: value.detach() for name, value in work.loaded.model.named_parameters() if value.requires_grad}
    loaded = _load_student(options, student, work.data)
    adapted = _prepare(options, plan, loaded)
    parameters = dict(loaded.model.named_parameters())
    restore({name: parameters[name] for name in learnt}, learnt, work.folder)
    return loaded, adapted


def _merge(loaded: Loaded, adapted: PeftModel | None, batch: Batch) -> float:
    """Fold the low-rank layers into the weights, if there are any; how much that changed the outputs."""
    loaded.model.eval()
    exact = ComputedIn(torch.float64) if loaded.model.dtype == torch.float32 else nullcontext()
    with exact:  # in fp32 badly cut models were seen to differ by more than is accepted, by rounding alone
        before = outputs(loaded.model, batch)
    merged = merge(adapted) if adapted is not None else loaded.model
    with exact:
        difference = relative_error(before, outputs(merged, batch))
    if not difference <= TOLERANCE[loaded.model.dtype]:
        raise CheckFailedError(
            f"the merged model differs from the trained one by {difference:.2e} (relative; accepted "
            f"{TOLERANCE[loaded.model.dtype]:.0e}); please report this model"
        )
    return difference


def _round(loaded: Loaded) -> None:
    """To the precision it is stored in: what is saved must not be worse than the cut model, whatever was trained."""
    computed = loaded.model.dtype
    cast(as_stored(loaded.model), computed)


def _load_student(options: LearnOptions, folder: Path, data: Trained) -> Loaded:
    loaded = load_to_compute(options, str(folder), beside=None if learns_whole(options) else 0.0)
    if options.train != "lora":  # weights that take small steps must be able to hold them
        cast(loaded.model, torch.float32)
    if _device(loaded).type == "cpu" and _is_short(loaded, data.training[0]):
        loaded.model.set_attn_implementation("eager")
    return loaded


def _is_short(loaded: Loaded, sample: Sample) -> bool:
    """On a CPU the backward of fused attention takes most of a step of a small model."""
    batch = collator_of(loaded).training([sample])
    return batch["input_ids"].shape[1] <= EAGER_TOKENS


def _device(loaded: Loaded) -> torch.device:
    """What is trained on; sharded models go there in pieces."""
    return torch.device("cuda") if sharded() and torch.cuda.is_available() else loaded.model.device


def _prepare(options: LearnOptions, plan: Plan, loaded: Loaded) -> PeftModel | None:
    """Say what is trained, in place; the adapted model, where low-rank layers were added."""
    model, family = loaded.model, loaded.family
    model.requires_grad_(options.train == "full")
    if options.frozen and "lora" in options.train:
        trained = family.projector if "projector" in options.train else ()
        freeze(model, options.frozen, [resolve(model, path, family) for path in trained])
    adapted = None
    if "lora" in options.train:
        slices = Slices(_dense_folder(options.model, plan), model, plan) if options.recall else None
        # Named, because torch warns when it must guess which of several GPUs draw.
        with torch.random.fork_rng({parameter.device for parameter in model.parameters() if parameter.is_cuda}):
            torch.manual_seed(options.seed)  # the new factors start at random
            adapted = attach(model, plan, slices, options)
    if "projector" in options.train:
        require_projector(options, family)
        for path in family.projector:
            resolve(model, path, family).requires_grad_(True)
    return adapted


def _dense_folder(name: str, plan: Plan) -> Path:
    """Where the model that was cut is, if it is still that model."""
    folder, digest = locate(name)
    if digest != plan.model_digest:
        raise CheckpointError(
            f"{name} is not the model that was cut ({digest[:12]}, the plan says {plan.model_digest[:12]}), so "
            "its weights can be neither recalled nor learnt from; put the original back"
        )
    return folder


def _load_teacher(options: LearnOptions, plan: Plan, loaded: Loaded, recipe: Recipe) -> PreTrainedModel:
    """The model that is learnt from, computing as the student does. Where blocks alone learn, its own may be read one
    after the other.
    """
    folder = options.teacher or str(_dense_folder(options.model, plan))
    teacher = load_to_compute(options, folder, beside=None if recipe.whole else 0.0).model
    check_family(teacher, loaded.family)
    check_teacher(loaded.model, teacher, loaded.family, followed(plan, teacher, loaded.family))
    attend_as(teacher, loaded.model)
    if options.frozen and not streamed(teacher):
        freeze(teacher, options.frozen)
    return teacher.requires_grad_(False)


def _settled(options: LearnOptions, recipe: Recipe, loaded: Loaded, data: Trained) -> LearnOptions:
    """With what was not given chosen for this model, recipe and data."""
    steps = steps_of(options, data)
    width = loaded.model.config.get_text_config().hidden_size
    return replace(
        options,
        steps=steps,
        learning_rate=options.learning_rate or RATE_TIMES_WIDTH[options.train] / width,
        warmup=min(options.warmup, steps // 4),
        precision=precision(options.precision, _device(loaded)),
        validate_every=options.validate_every or max(1, -(-steps // data.validations)),
        # Features have gradients a hundred times smaller than answers: with the second moments of a feature stage the
        # first steps on answers are so long that they undo it.
        reset_optimizer=recipe.staged if options.reset_optimizer is NOT_GIVEN else options.reset_optimizer,
    )


def precision(asked: str, device: torch.device) -> str:
    """`auto`: bf16 where the device multiplies it faster than fp32."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"
