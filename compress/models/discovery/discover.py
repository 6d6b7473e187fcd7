"""Rows of the family table for a model that has none, with what was not understood."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any  # configs and lists of blocks of transformers

import torch
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.discovery.blocks import MODALITIES, Stack, find_stacks, specimen_of
from slimvlm.compress.models.discovery.parts import NotUnderstood, Part, recognise
from slimvlm.compress.models.discovery.probing import Probe
from slimvlm.compress.models.discovery.proving import prove
from slimvlm.compress.models.discovery.stock import sized
from slimvlm.compress.models.families import TEXTS, TOWERS, Attention, Export, Family, Join, Text, Tower
from slimvlm.compress.models.families.compose import join_rows, model_type_of
from slimvlm.compress.models.families.rows import Stacks

STATES = ("vision_feature_layers", "vision_feature_layer")  # what configs call the states of the tower that are read
COUNTS = ("layers", "depth", "blocks")  # in names of config fields that count blocks


@dataclass(frozen=True, slots=True)
class Discovery:
    """The rows that experiments say, every part of them proved.

    Attributes:
        keys: of the rows `join`, `tower` and `text` in JOINS, TOWERS and TEXTS.
        unknown: what was not understood, in sentences; that stays whole, and no row says it.
    """

    keys: tuple[str, str, str]
    join: Join
    tower: Stacks
    text: Text
    unknown: tuple[str, ...]

    @property
    def family(self) -> Family:
        """What the rows make together."""
        model_type, tower, text = self.keys
        return join_rows(model_type, self.join, (tower, self.tower), (text, self.text))

    def trusted(self) -> Family:
        """The family, if everything was understood.

        Raises:
            UnsupportedModelError: something was not; all of it is named.
        """
        if self.unknown:
            raise UnsupportedModelError(
                f"{self.keys[0]} is not understood: {'; '.join(self.unknown)}. Nothing is guessed: give it rows by "
                "hand (CONTRIBUTING.md, Add a family), beginning with those that `slimvlm inspect --discover` prints"
            )
        return self.family


def discover(model: PreTrainedModel, afresh: bool = False) -> Discovery:
    """Experiments on the blocks of `model`, which may be on the meta device: no weight of it is read.

    Args:
        afresh: also on towers and text models that the table knows; else their rows are taken from it.

    Raises:
        UnsupportedModelError: it has no two towers whose blocks are in lists.
    """
    unknown: list[str] = []
    stacks = find_stacks(model)
    model_type, tower_type, text_type = (model_type_of(model.config, part) for part in ("", *MODALITIES))
    vision, *others = _of_section(model, stacks, "vision_config")
    text = _of_section(model, stacks, "text_config")
    known_tower = None if afresh else TOWERS.get(tower_type)
    known_text = None if afresh else TEXTS.get(text_type)
    if others and known_tower is None:
        paths = ", ".join(stack.path for stack in (vision, *others))
        unknown.append(f"{paths}: a row of a tower knows one list of blocks")
    if len(text) > 2 and known_text is None:
        unknown.append(f"{', '.join(stack.path for stack in text)}: a row of a text model knows two lists of blocks")
    join, base = _join(model, vision, text)
    tower = known_tower or _tower(model, vision, ("vision", join.vision), unknown)
    names = ("encoder", "decoder") if len(text) == 2 else ("language",)
    root = f"{join.language}.{base}".rstrip(".") if join.headed else join.language
    towers = (_tower(model, stack, (name, root), unknown) for name, stack in zip(names, text, strict=False))
    found = known_text or Text(tuple(towers), _kind(model.config.text_config), base)
    if isinstance(tower, Tower) and not tower.depth:
        join = replace(join, states=None)  # blocks that nobody reads could not leave
    unknown += _shared(model, stacks)
    return Discovery((model_type, tower_type, text_type), join, tower, found, tuple(unknown))


def _of_section(model: PreTrainedModel, stacks: list[Stack], section: str) -> list[Stack]:
    found = [stack for stack in stacks if stack.section == section]
    if not found:
        raise UnsupportedModelError(
            f"{model.config.model_type} has no list of blocks that read hidden states and belong to its {section}: "
            "there is nothing to discover; give it rows by hand (CONTRIBUTING.md, Add a family)"
        )
    return found


def _kind(config: Any) -> str:
    return "encoder-decoder" if getattr(config, "is_encoder_decoder", False) else "decoder"


def _tower(model: PreTrainedModel, stack: Stack, where: tuple[str, str], unknown: list[str]) -> Tower:
    """The tower, with the parts of all its kinds of blocks; what is in none of them is added to `unknown`.

    Args:
        where: its name, and the module that its path is relative to.
    """
    name, root = where
    config = getattr(model.config, stack.section)
    blocks: Any = model.get_submodule(stack.path)
    kinds = {tuple((path, one.shape) for path, one in block.named_parameters()): block for block in blocks}
    found: list[tuple[Part, ...]] = []
    for block in kinds.values():
        parts, strange = parts_of(block, config)
        found.append(parts)
        unknown += [f"{stack.path}: {sentence}" for sentence in strange if f"{stack.path}: {sentence}" not in unknown]
    everywhere = [part for part in found[0] if all(part in other for other in found)]
    together = dict.fromkeys(chain.from_iterable(found))
    if len(together) > len(everywhere) and any(len(one) == len(everywhere) for one in found):
        unknown.append(
            f"{stack.path}: its blocks are of {len(kinds)} kinds, and in one of them only a part is understood"
        )
        together = dict.fromkeys(everywhere)
    parts = tuple(replace(sized(model, stack, part), optional=part not in everywhere) for part in together)
    depth = tuple(_depth(model, stack, len(blocks)))
    path = stack.path.removeprefix(f"{root}.")
    return Tower(name, MODALITIES[stack.section], stack.section, path, parts, depth=depth)


def parts_of(block: nn.Module, config: Any) -> tuple[tuple[Part, ...], list[str]]:
    """The proved parts of a block, attentions first, and what is in none of them."""
    try:
        probe = Probe(specimen_of(block, config))
    except ValueError as error:
        return (), [f"{type(block).__name__} cannot be called alone: {error}"]
    parts: list[Part] = []
    strange: list[str] = []
    for one in recognise(probe):
        names = ", ".join(path for path in probe.linears if path in one.linears)
        if isinstance(one, NotUnderstood):
            strange.append(f"{names}: {one.why}")
            continue
        try:
            parts.append(prove(probe.specimen, one))
        except ValueError as error:
            strange.append(f"{names}: {error}")
    for path, parameter in block.named_parameters():
        if parameter.ndim > 1 and path.rpartition(".")[0] not in probe.linears:
            strange.append(f"{path}: it is no weight of a linear")
    return _distinct(sorted(parts, key=lambda part: not isinstance(part, Attention))), strange


def _distinct(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts, those of one key numbered."""
    keys = [part.key for part in parts]
    again = [keys[:place].count(part.key) for place, part in enumerate(parts)]
    return tuple(
        replace(part, key=f"{part.key}{count + 1}") if count else part for part, count in zip(parts, again, strict=True)
    )


def _depth(model: PreTrainedModel, stack: Stack, count: int) -> Iterator[str]:
    """The config field that counts the blocks, found by building the model with one less; none where a field seems to
    name blocks by number: whole blocks stay there."""
    sections = {name: getattr(model.config, name).to_dict() for name in MODALITIES}
    section = sections[stack.section]
    if count < 2 or any(_numbers(value, count) for one in sections.values() for value in one.values()):
        return
    for name in [name for name, value in section.items() if value == count and any(word in name for word in COUNTS)]:
        config = copy.deepcopy(model.config)
        part = getattr(config, stack.section)
        setattr(part, name, count - 1)
        for listed, value in section.items():
            if isinstance(value, list) and len(value) == count:
                setattr(part, listed, value[:-1])
        try:
            with torch.device("meta"):
                built: Any = type(model)(config).get_submodule(stack.path)
        except Exception:  # somebody else's class, given a config on suspicion
            continue
        if len(built) == count - 1:
            yield name
            return


def _numbers(value: object, count: int) -> bool:
    """Whether `value` may be numbers of blocks, `count` of which there are."""
    return isinstance(value, list) and 0 < len(value) < count and all(type(one) is int for one in value)


def _shared(model: nn.Module, stacks: list[Stack]) -> Iterator[str]:
    """Weights of blocks that are somewhere else, too."""
    places: dict[int, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        other = places.setdefault(id(parameter), path)
        if other != path and any(one.startswith(f"{stack.path}.") for stack in stacks for one in (path, other)):
            yield f"{other} and {path} are one weight"


def _join(model: PreTrainedModel, vision: Stack, text: list[Stack]) -> tuple[Join, str]:
    """What joins the towers, and the base of the text model (see Text)."""
    config: Any = model.config
    vision_root, text_root = _root(model, vision), _root(model, text[0])
    output = model.get_output_embeddings()
    head = next((path for path, one in model.named_modules() if output is not None and one is output), "")
    prefix = getattr(model.get_submodule(text_root), "base_model_prefix", "")
    headed = head.startswith(f"{text_root}.")
    based = all(stack.path.startswith(f"{text_root}.{prefix}.") for stack in text)
    positions = "mrope" if "mrope" in str(config.text_config.to_dict().get("rope_parameters")) else "count"
    join = Join(
        {},
        vision_root,
        text_root,
        tuple(_projectors(model, [vision, *text], head)),
        export=Export(positions=positions),
        headed=headed,
        contrastive=type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        states=next((name for name in STATES if name in config.to_dict()), None),
    )
    return join, prefix if based else "model" * (not headed)


def _root(model: nn.Module, stack: Stack) -> str:
    """The outermost module around a list of blocks that its part of the config built."""
    wanted = type(getattr(model.config, stack.section))
    steps = stack.path.split(".")
    paths = [".".join(steps[:count]) for count in range(1, len(steps))]
    return next(path for path in paths if type(getattr(model.get_submodule(path), "config", None)) is wanted)


def _projectors(model: nn.Module, stacks: list[Stack], head: str) -> Iterator[str]:
    """Modules with linears beside the towers, outermost first."""
    done = [*([head] if head else []), *(stack.path for stack in stacks)]
    for path, module in model.named_modules():
        around = not path or any(f"{one}.".startswith(f"{path}.") for one in done)
        inside = any(path.startswith(f"{one}.") for one in done)
        if not around and not inside and any(isinstance(one, nn.Linear) for one in module.modules()):
            done.append(path)
            yield path
