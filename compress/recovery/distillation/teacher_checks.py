"""Whether a teacher fits a student: family, widths, depths, vocabulary, image size; both may be on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import Attention, Family, find_family
from slimvlm.compress.models.groups import depths_of, parts_of
from slimvlm.compress.models.projections import resolve
from slimvlm.compress.recovery.distillation.recipe import Recipe


def check_family(teacher: nn.Module, family: Family) -> None:
    """The teacher is of the student's `family`: only then its blocks are where that says.

    Raises:
        UnsuitableOptionError: it is not.
    """
    other = find_family(teacher.config)
    if other.name != family.name:
        raise UnsuitableOptionError(
            f"the teacher is a {other.name} model and the student a {family.name} model; "
            "use the dense model the student was cut from"
        )


def check_teacher(
    student: nn.Module, teacher: nn.Module, family: Family, block_map: Mapping[str, tuple[int, ...]]
) -> None:
    """The teacher is the student before the cut, or a model of its `family` and shape.

    Args:
        block_map: tower -> the teacher layer each student layer follows; missing: the same layer.

    Raises:
        UnsuitableOptionError: it is not (the first difference is named).
    """
    check_family(teacher, family)
    own, given = depths_of(student, family), depths_of(teacher, family)
    here, there = _outline(student, family), _outline(teacher, family)
    unlike = [name for name, depth in given.items() if own[name] != depth]
    if not all(_mapped(block_map.get(name, ()), own[name], given[name]) for name in unlike):
        here["depths"], there["depths"] = own, given
    for what in here:
        if here[what] != there[what]:
            raise UnsuitableOptionError(
                f"the teacher has {what} {there[what]}, the student {here[what]}; "
                "use the dense model the student was cut from"
            )


def check_states(recipe: Recipe, model: nn.Module, family: Family) -> None:
    """The hidden states that the recipe compares exist in `model`.

    Raises:
        UnsuitableOptionError: one does not.
    """
    if "hidden" not in recipe.losses or family.contrastive:
        return
    states = depths_of(model, family)[family.towers[-1].name] + 1
    for index in recipe.hidden_states:
        if not -states <= index < states:
            raise UnsuitableOptionError(
                f"hidden state {index} does not exist; choose from {-states} to {states - 1} (-1 is the last)"
            )


def _outline(model: nn.Module, family: Family) -> dict[str, object]:
    """What no cut changes; what the vision tower expects of images is None where it takes any."""
    config: Any = model.config  # transformers' own, one class per family
    widths = {}
    for tower in family.towers:
        layer, part = next(  # not every block has one everywhere
            (layer, part)
            for layer in range(depths_of(model, family)[tower.name])
            for part in parts_of(model, family, tower, layer)
            if isinstance(part, Attention)
        )
        output: Any = resolve(model, f"{tower.blocks}.{layer}.{part.module}.{part.output}", family)
        widths[tower.name] = output.weight.shape[0]
    images = {name: getattr(config.vision_config, name, None) for name in ("image_size", "patch_size")}
    return {"vocabulary": config.text_config.vocab_size, "residual widths": widths, "images": images}


def _mapped(layers: tuple[int, ...], depth: int, teachers: int) -> bool:
    """Whether every layer of a tower of `depth` is given one of the teacher's."""
    return len(layers) == depth and all(0 <= layer < teachers for layer in layers)
