"""From the config of a model to its family: the rows of its tower, of its text model, and of what joins them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NoReturn

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.files.decoding import MisfitError, decode
from slimvlm.compress.models.families.joins import JOINS
from slimvlm.compress.models.families.rows import Family, Join, Mlp, Stacks, Text, Tower
from slimvlm.compress.models.families.texts import TEXTS
from slimvlm.compress.models.families.towers import TOWERS

CARRIED = "slimvlm_family"  # field of a config: the family of a model that has no row, found by experiment
ENDINGS = ("_vision_model", "_vision", "_text_model", "_text")  # what a name is readable without


def find_family(config: object) -> Family:
    """The family of a transformers config: the one that it carries, or that of the table.

    Raises:
        UnsupportedModelError: there is no row for how it is joined, for its tower or for its text model; the message
            says which, and lists the known ones.
    """
    if carried := getattr(config, CARRIED, None):
        return _carried_by(carried)
    model_type, tower, text = (model_type_of(config, part) for part in ("", "vision_config", "text_config"))
    if model_type not in JOINS:
        _refuse(f"model type {model_type!r}", "families", JOINS)
    if JOINS[model_type].vision and tower not in TOWERS:
        _refuse(f"vision tower {tower!r} of a {model_type!r} model", "vision towers", TOWERS)
    if text not in (known := JOINS[model_type].texts or TEXTS):
        _refuse(f"text model {text!r} of a {model_type!r} model", "text models", known)
    family, config = compose(model_type, tower, text), getattr(config, "vision_config", None)
    pooled = [bool(one.pooled and getattr(config, one.pooled, True)) for one in family.towers]
    towers = (_without_stock_mlp(one) if is_so else one for one, is_so in zip(family.towers, pooled, strict=True))
    return replace(family, towers=tuple(towers))


def compose(model_type: str, tower: str, text: str) -> Family:
    """The family of a key of JOINS, of TOWERS and of TEXTS."""
    join = JOINS[model_type]
    return join_rows(model_type, join, (tower, TOWERS[tower] if join.vision else ()), (text, TEXTS[text]))


def join_rows(model_type: str, join: Join, vision_row: tuple[str, Stacks], text_row: tuple[str, Text]) -> Family:
    """The family of three rows; those of the tower and of the text model with their keys."""
    (tower, vision), (text, language) = vision_row, text_row
    root = f"{join.language}.{language.base}".rstrip(".") if join.headed else join.language
    head = f"{join.language}.lm_head" if join.headed else "lm_head"
    export = replace(join.export, text=root, head=head, refused=join.export.refused or language.ungraphed)
    towers = (
        *(_placed(replace(stack, states=join.states), join.vision) for stack in _stacks(vision)),
        *(_placed(_without_stock_mlp(stack) if join.shared else stack, root) for stack in language.towers),
    )
    parts = (tower, text) if vision else (text,)
    return Family(
        join.names.get((tower, text), f"{model_type} ({', '.join(map(_readable, parts))})"),
        model_type,
        "dual-encoder" if join.contrastive else language.kind,
        tuple(_doubled(one) if one.name in join.doubled else one for one in towers),
        former=tuple(join.names.values()),
        projector=join.projector,
        resampler=join.resampler,
        cropped=join.cropped,
        features=join.features,
        export=export,
    )


def _stacks(row: Stacks) -> tuple[Tower, ...]:
    return row if isinstance(row, tuple) else (row,)


def _placed(tower: Tower, root: str) -> Tower:
    before = tuple(f"{root}.{name}" for name in tower.before)
    return replace(tower, root=root, blocks=f"{root}.{tower.blocks}", before=before)


def model_type_of(config: object, part: str) -> str:
    """Of the config, or of a part of it: that of its class, because old files give a tower the name of its family."""
    found = getattr(config, part, None) if part else config
    return str(getattr(type(found), "model_type", "") or getattr(found, "model_type", None))


def _carried_by(value: object) -> Family:
    try:
        return decode(value, Family)
    except MisfitError as error:
        raise UnsupportedModelError(
            f"{CARRIED} of the config does not fit ({error}); delete it, and discover the family anew"
        ) from error


def _doubled(tower: Tower) -> Tower:
    """Another tower is built of the same config: nothing is cut that its fields say, and all blocks stay."""
    return replace(_without_stock_mlp(tower), depth=(), states=None)


def _without_stock_mlp(tower: Tower) -> Tower:
    """Something else has the width of its MLPs, of the same config field."""
    parts = tuple(replace(part, stock=None) if isinstance(part, Mlp) else part for part in tower.parts)
    return replace(tower, parts=parts)


def _readable(model_type: str) -> str:
    ending = next((ending for ending in ENDINGS if model_type.endswith(ending)), "")
    return model_type.removesuffix(ending)


def _refuse(asked: str, kind: str, known: Iterable[str]) -> NoReturn:
    raise UnsupportedModelError(
        f"{asked} is not supported; known {kind}: {', '.join(known)}. `slimvlm inspect --discover` looks for "
        "what it consists of"
    )


FAMILIES: tuple[Family, ...] = tuple(  # those with a name of their own
    compose(model_type, *pair) for model_type, join in JOINS.items() for pair in join.names
)
MODALITIES = {tower.name: tower.modality for family in FAMILIES for tower in family.towers}
