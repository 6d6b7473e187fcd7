"""What of a recovery is refused before any work: options that contradict each other, or do not fit the models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.checkpoint import build_meta
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.quantized import require_torchao
from slimvlm.compress.options import IN_TORCH, ROUNDED, TRAINED, LearnOptions, RecoverOptions
from slimvlm.compress.recovery.adapters.targets import check_ranks, find_targets
from slimvlm.compress.recovery.distillation.recipe import Recipe, parse_recipe
from slimvlm.compress.recovery.distillation.teacher_checks import check_states, check_teacher

WHOLE = ("accumulate", "gradient_checkpointing", "patience", "teacher_cache")
DEFAULTS = {field.name: field.default for field in fields(RecoverOptions)}


def recipe_of(options: RecoverOptions) -> Recipe:
    """What the student learns from.

    Raises:
        UnsuitableOptionError: a recipe that is none, or an option that would change nothing.
        MissingDependencyError: a frozen base without torchao.
    """
    states = tuple(dict.fromkeys(options.hidden_states))
    recipe = replace(parse_recipe(options.recover), temperature=options.temperature, hidden_states=states)
    if recipe.features:
        share = recipe.feature_share if options.feature_share is None else options.feature_share
        recipe = replace(recipe, staged=options.staged, feature_share=share)
    if recipe.block_share and recipe.whole and options.block_share is not None:
        recipe = replace(recipe, block_share=options.block_share)
    if options.train not in TRAINED:
        raise UnsuitableOptionError(f"--train {options.train} is unknown; choose one of {', '.join(TRAINED)}")
    if recipe.block_share and "projector" in options.train and not (recipe.whole and "lora" in options.train):
        raise UnsuitableOptionError(
            f"--train {options.train}: blockwise trains blocks, and no block holds the projector; use --train lora or "
            "full, or lora+projector with a recipe after it, as blockwise+lpd"
        )
    if options.recover_as is not None and options.recover_as not in ROUNDED:
        raise UnsuitableOptionError(
            f"--recover-as {options.recover_as} is no variant that a recovery can be trained for; choose one of "
            f"{', '.join(ROUNDED)}, whose weights alone are rounded"
        )
    if options.frozen is not None:
        _check_frozen(options, recipe)
    for name, purpose in _idle(options, recipe):
        if getattr(options, name) != DEFAULTS[name]:
            raise UnsuitableOptionError(
                f"--{name.replace('_', '-')} is for {purpose}, which this recovery goes without; leave it out"
            )
    return recipe


def learns_whole(options: RecoverOptions) -> bool:
    """Whether the student is in memory as a whole while it learns, and not a block at a time.

    Raises:
        UnsuitableOptionError, MissingDependencyError: as `recipe_of`.
    """
    return bool(recipe_of(options).whole or options.frozen or options.recover_as)


def _check_frozen(options: RecoverOptions, recipe: Recipe) -> None:
    if options.frozen not in IN_TORCH:
        raise UnsuitableOptionError(f"--frozen {options.frozen} is unknown; choose one of {', '.join(IN_TORCH)}")
    require_torchao()
    if "lora" not in options.train and not recipe.needs_teacher:
        raise UnsuitableOptionError(
            f"--frozen {options.frozen} holds what is not trained, and --train {options.train} without a teacher has "
            "nothing of the kind to hold; leave it out, or train low-rank layers (--train lora)"
        )
    if options.recover_as is not None:
        raise UnsuitableOptionError(
            f"--recover-as {options.recover_as} rounds the weights anew in every forward, and --frozen "
            f"{options.frozen} holds them rounded otherwise; give one of both"
        )


def require_projector(options: RecoverOptions, family: Family) -> None:
    """Refuse to train a projector that is not there.

    Raises:
        UnsuitableOptionError: the family has none.
    """
    if "projector" in options.train and not family.projector:
        raise UnsuitableOptionError(f"family {family.name} has no projector to train; use --train lora or full")


def check_models(options: LearnOptions, attention_unit: str) -> None:
    """The recovery fits the dense model and its teacher, as far as their configurations tell.

    Raises:
        UnsuitableOptionError: it does not.
        CheckpointError, UnsupportedModelError: the model or the teacher cannot be read.
    """
    recipe = recipe_of(options)
    model, family = build_meta(options.model, options.trust_remote_code)
    require_projector(options, family)
    if "lora" in options.train:
        check_ranks(model, find_targets(model, attention_unit, options.targets), options)
    if recipe.needs_teacher and options.teacher is not None:
        check_teacher(model, build_meta(options.teacher, options.trust_remote_code)[0], family, {})
    check_states(recipe, model, family)


def _idle(options: RecoverOptions, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(option, what it is for) that change nothing in this recovery."""
    adapts = "lora" in options.train
    purposes = {
        "the losses kl and rkl": (("temperature",), {"kl", "rkl"} & set(recipe.losses)),
        "the loss hidden": (("hidden_states",), "hidden" in recipe.losses),
        "the stages of lpd": (("feature_share",), recipe.staged),
        "blockwise before another recipe": (("block_share",), recipe.block_share and recipe.whole),
        "recipes that learn from a teacher": (("teacher", "teacher_cache"), recipe.needs_teacher),
        "the training of the model as a whole": (WHOLE, recipe.whole),
        "low-rank layers": (("rank", "alpha", "dropout", "targets"), adapts),
        "weight recalling": (("recall_rank",), adapts and options.recall),
    }
    for purpose, (names, used) in purposes.items():
        if not used:
            yield from ((name, purpose) for name in names)
