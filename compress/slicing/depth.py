"""Whole blocks leave: the list of blocks gets shorter, and whatever counts blocks is renumbered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any  # stacks of blocks, whatever their class

from torch import nn
from transformers import PreTrainedModel

from slimvlm.compress.models.families import Family, Tower
from slimvlm.compress.models.groups import live_blocks, read_states
from slimvlm.compress.models.modeling_slim import Record
from slimvlm.compress.models.projections import resolve
from slimvlm.compress.plan import Plan


def shortened(model: nn.Module, family: Family, plan: Plan) -> Iterator[tuple[Tower, tuple[int, ...]]]:
    """The towers that lose blocks, dead ones included, with the numbers of those that stay."""
    for tower in family.towers:
        kept = plan.blocks.get(tower.name, tuple(range(live_blocks(model, family, tower))))
        if len(kept) < len(resolve(model, tower.blocks, family)):
            yield tower, kept


def left_out(model: nn.Module, tower: Tower, kept: Sequence[int]) -> list[nn.Module]:
    """The blocks of `tower` besides `kept`."""
    blocks: Any = model.get_submodule(tower.blocks)
    return [block for index, block in enumerate(blocks) if index not in kept]


def drop_blocks(model: PreTrainedModel, tower: Tower, kept: Sequence[int], record: Record) -> None:
    """Take all blocks but `kept` out of `tower`, in place.

    Renumbered are the caches' layers, what the tower's config lists or numbers, the hidden states that are read (from
    the front: -1 is what InternVL normalises first) and the paths of `record` (see modeling_slim).
    """
    blocks: Any = model.get_submodule(tower.blocks)
    states = [sum(index < state for index in kept) for state in read_states(model.config, tower, len(blocks))]
    if tower.states:
        one = isinstance(getattr(model.config, tower.states), int)
        setattr(model.config, tower.states, states[0] if one else states)
    _renumber(model, tower, kept)
    if tower.first and kept[0]:
        module, table, flag = tower.first
        heir = blocks[kept[0]].get_submodule(module)
        setattr(heir, table, getattr(blocks[0].get_submodule(module), table))
        setattr(heir, flag, True)
    left = [blocks[index] for index in kept]
    del blocks[:]
    blocks.extend(left)
    for index, block in enumerate(left):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    for field in {"shapes", "stacked", "biases", "attributes", "forwards"} & record.keys():
        paths = ((moved(path, tower, kept), value) for path, value in record[field].items())
        record[field] = {path: value for path, value in paths if path is not None}
    layers = record["per_layer_config"].get(tower.name, {})
    found = {str(place): layers[str(index)] for place, index in enumerate(kept) if str(index) in layers}
    if layers:
        record["per_layer_config"][tower.name] = found


def _renumber(model: PreTrainedModel, tower: Tower, kept: Sequence[int]) -> None:
    """What the tower's config, and the modules around the blocks, list of them or know by number."""
    config = attrgetter(tower.config)(model.config)
    for name in tower.listed:
        if isinstance(listed := getattr(config, name, None), list):
            setattr(config, name, [listed[index] for index in kept])
    if tower.stepped:
        _number_stepped(config, tower.stepped, len(model.get_submodule(tower.blocks)))  # type: ignore[arg-type]
    for name in tower.numbered:
        numbers = [place for place, index in enumerate(kept) if index in (getattr(config, name) or ())]
        for owner in (config, *_around(model, tower)):
            if getattr(owner, name, None) is not None:
                setattr(owner, name, numbers)


def _number_stepped(config: Any, fields: tuple[str, str], blocks: int) -> None:
    """Name by number all blocks that a step leaves out."""
    step, others = fields
    every = getattr(config, step)
    setattr(
        config, others, [index for index in range(blocks) if index in getattr(config, others) or (index + 1) % every]
    )
    setattr(config, step, 1)


def _around(model: nn.Module, tower: Tower) -> Iterator[nn.Module]:
    """The modules that hold the blocks, from the inside out."""
    path = tower.blocks
    while path:
        path = path.rpartition(".")[0]
        yield model.get_submodule(path)


def write_depth(model: PreTrainedModel, tower: Tower) -> None:
    """Say in the config of the stock class how many blocks `tower` has."""
    count = len(model.get_submodule(tower.blocks))  # type: ignore[arg-type]  # a list of blocks
    config = attrgetter(tower.config)(model.config)
    for name in tower.depth:
        setattr(config, name, count)
    if hasattr(config, "stage_names"):  # DINOv2 names what goes into its blocks and comes out, and what it would give
        config.stage_names = config.stage_names[: count + 1]
        config.out_indices = [count]
    stack: Any = model.get_submodule(tower.blocks.rpartition(".")[0])
    if stack.config is not config:  # a copy where T5 is
        stack.config.num_hidden_layers = count


def place(path: str, family: Family, plan: Plan) -> str:
    """Where the module at `path`, which stays, is once the blocks of `plan` have left."""
    for tower in family.towers:
        if tower.name in plan.blocks:
            path = moved(path, tower, plan.blocks[tower.name]) or path
    return path


def moved(path: str, tower: Tower, kept: Sequence[int]) -> str | None:
    """Where the module at `path` is once only the blocks `kept` of `tower` are left; None: it left."""
    if not path.startswith(f"{tower.blocks}."):
        return path
    index, _, rest = path.removeprefix(f"{tower.blocks}.").partition(".")
    return f"{tower.blocks}.{kept.index(int(index))}.{rest}" if int(index) in kept else None
