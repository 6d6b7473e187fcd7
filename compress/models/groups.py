"""Which weights must be cut together: the family row and a model (real or on the meta device) give the list of groups.

A group is one attention or one MLP of one block. Its finest *index* is a hidden channel (MLP) or a query head
(attention; query head h belongs to KV head h // (H / K), so the kept KV heads follow from the kept query heads). What
an allocator takes or leaves is a *unit*, a set of indices: one channel; one head; a KV group with all its query heads;
or a query slot, one query head out of every KV group. The residual width is never cut, so every matrix loses either
rows or columns. The blocks of a tower are a group of another kind (`find_blocks`): its units leave whole, and with
them what is inside. No plan chooses among blocks and what is inside them at once: it plans blocks, or what is inside,
or is composed of two plans, the later of which was made for the model that the earlier leaves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray
from torch import nn

from slimvlm.compress.models.experts import met_weights, take_apart
from slimvlm.compress.models.families import Attention, Experts, Family, Mlp, Part, Tower
from slimvlm.compress.models.projections import (
    Member,
    attention_members,
    expert_members,
    has_module,
    mlp_members,
    resolve,
)
from slimvlm.compress.options import ATTENTION_UNITS
from slimvlm.compress.plan import BLOCK

MIN_KV_HEADS = 4  # below this, cutting whole KV groups is too coarse: `auto` cuts query slots


@dataclass(frozen=True, slots=True)
class Dead:
    """Blocks at the end of a tower whose output nobody reads: their number, parameters, and weights of linears."""

    blocks: int
    parameters: int
    macs: int


@dataclass(frozen=True, slots=True)
class Block:
    """A block that may leave: its number, parameters, and weights of linears."""

    index: int
    parameters: int
    macs: int


@dataclass(frozen=True, slots=True)
class Group:
    """Units that must be cut together.

    Attributes:
        home: the tower it is in.
        layer: number of its block; 0 for the blocks of a tower.
        part: its row in the family table.
        path: attention module, the block of an MLP, the experts, or the list of blocks.
        size: indices: channels I of an MLP (or of all experts, one after the other), query heads H of an attention,
            blocks that are not dead.
        unit: `channel`, `head`, `kv-group`, `query-slot`, `channel-slot` or `block`; num_units of them.
        weights_per_unit: weights one unit owns (biases not counted): the divisor of the block-wise normaliser.
        parameters_per_unit: weights and biases that leave with one unit (of blocks, the mean; they differ).
        kv_heads, head_dim: K and D of an attention; 0 and 1 for an MLP; experts stand where KV heads do.
        share: of the tokens that pass, those that meet a weight of it.
        blocks: what may leave, one block per unit; empty for groups of another kind.
    """

    home: Tower
    layer: int
    part: Attention | Mlp | Experts | Tower
    path: str
    size: int
    unit: str
    num_units: int
    weights_per_unit: int
    parameters_per_unit: int
    members: tuple[Member, ...] = ()
    kv_heads: int = 0
    head_dim: int = 1
    blocks: tuple[Block, ...] = ()
    share: float = 1.0

    @property
    def tower(self) -> str:
        return self.home.name

    @property
    def modality(self) -> str:
        return self.home.modality

    @property
    def kind(self) -> str:
        """`attention`, `mlp` or `block`."""
        return {Attention: "attention", Mlp: "mlp", Experts: "mlp", Tower: BLOCK}[type(self.part)]

    @property
    def key(self) -> str:
        """`language.3.attn`, or `language.block` for the blocks of a tower."""
        part = self.part
        return f"{self.tower}.{BLOCK}" if isinstance(part, Tower) else f"{self.tower}.{self.layer}.{part.key}"

    @property
    def parameters(self) -> NDArray[np.int64]:
        """Parameters that leave with each unit, int64 [num_units]."""
        if self.blocks:
            return np.array([block.parameters for block in self.blocks])
        return np.full(self.num_units, self.parameters_per_unit)

    @property
    def macs(self) -> NDArray[np.int64]:
        """Multiply-accumulates per token of each unit's linears: the weights it meets; int64 [num_units]."""
        if self.blocks:
            return np.array([block.macs for block in self.blocks])
        return np.full(self.num_units, round(self.share * self.weights_per_unit))

    @property
    def block_paths(self) -> list[str]:
        """Of the blocks that may leave. [num_units]."""
        return [f"{self.path}.{block.index}" for block in self.blocks]

    @property
    def fixed(self) -> list[int]:
        """The blocks that cannot leave."""
        free = {block.index for block in self.blocks}
        return [index for index in range(self.size) if free and index not in free]

    @property
    def slots(self) -> bool:
        """Its units are one query head of every KV group, or one channel of every expert."""
        return self.unit.endswith("-slot")

    @property
    def indices_per_unit(self) -> int:
        return 1 if self.blocks else self.size // self.num_units

    @property
    def heads_per_kv(self) -> int:
        """Query heads per KV head (1 for plain multi-head attention and MLPs), or channels per expert."""
        return self.size // self.kv_heads if self.kv_heads else 1

    def narrowed(self, units: int) -> Group:
        """The group with so many of its units; what it consists of stays unsaid."""
        per_kv = self.slots or not self.kv_heads
        kv_heads = self.kv_heads if per_kv else units
        return replace(self, size=units * self.indices_per_unit, num_units=units, kv_heads=kv_heads)

    def indices_of(self, member: Member) -> range:
        """The indices of the group, or the KV heads, whose rows or columns `member` has."""
        if member.expert is not None:
            return range(member.expert * self.heads_per_kv, (member.expert + 1) * self.heads_per_kv)
        return range(self.kv_heads if member.heads == "kv" else self.size)


def find_units(model: nn.Module, family: Family, kind: str, attention_unit: str = "auto") -> tuple[Group, ...]:
    """The groups with units of this kind: `width` (see `find_groups`) or `block` (see `find_blocks`)."""
    return find_blocks(model, family) if kind == BLOCK else find_groups(model, family, attention_unit)


def find_groups(
    model: nn.Module, family: Family, attention_unit: str = "auto", dead: bool = False
) -> tuple[Group, ...]:
    """All prunable groups of `model`, in table order. Reads shapes only: meta is enough. Experts are taken apart.

    Args:
        attention_unit: `kv-group`, `query-slot`, or `auto` (query slots where there are fewer than four KV heads).
            Attention without grouped queries always has single heads as units.
        dead: those of dead blocks too, which run all the same.

    Raises:
        ValueError: unknown attention unit.
        UnsupportedModelError: a path of the family row does not resolve in this model.
    """
    if attention_unit not in ATTENTION_UNITS:
        raise ValueError(f"attention unit {attention_unit!r} is unknown; choose one of {', '.join(ATTENTION_UNITS)}")
    take_apart(model, family)
    groups = []
    for tower in family.towers:
        blocks = resolve(model, tower.blocks, family)
        for layer in range(len(blocks) if dead else live_blocks(model, family, tower)):
            for part in parts_of(model, family, tower, layer):
                if isinstance(part, Attention):
                    groups.append(_attention_group(model, family, (tower, layer, part), attention_unit))
                elif isinstance(part, Mlp):
                    groups.append(_mlp_group(model, family, tower, layer, part))
                elif isinstance(part, Experts):
                    groups.append(_experts_group(model, family, tower, layer, part))
    return tuple(groups)


def parts_of(model: nn.Module, family: Family, tower: Tower, layer: int) -> list[Part]:
    """Those of the tower's parts that one of its blocks has.

    Raises:
        UnsupportedModelError: it lacks one that every block has, or has none of those that only some have.
    """
    path = f"{tower.blocks}.{layer}"
    optional = [part for part in tower.parts if part.optional]
    lacking = [part for part in optional if not has_module(model, f"{path}.{part.exit}")]
    for part in tower.parts if len(lacking) == len(optional) else ():
        resolve(model, f"{path}.{part.exit}", family)
    return [part for part in tower.parts if part not in lacking]


def find_blocks(model: nn.Module, family: Family) -> tuple[Group, ...]:
    """The blocks of every tower as units, one group per tower. Dead ones are none, nor those that
    must stay, nor any of a tower whose depth no field of its config says.

    Raises:
        UnsupportedModelError: as `find_groups`.
    """
    groups = []
    for tower in (tower for tower in family.towers if tower.depth):
        live = live_blocks(model, family, tower)
        fixed: list[int] = attrgetter(tower.deepstack)(model.config) if tower.deepstack else []
        stays = {*(fixed if tower.modality == "vision" else range(len(fixed))), *_counting(model, family, tower)}
        blocks = tuple(
            Block(index, *weigh(tower, [block]))
            for index, block in enumerate(resolve(model, tower.blocks, family)[:live])
            if index not in stays
        )
        if blocks:
            macs = sum(block.macs for block in blocks) // len(blocks)
            parameters = sum(block.parameters for block in blocks) // len(blocks)
            sizes = (live, BLOCK, len(blocks), macs, parameters)
            groups.append(Group(tower, 0, tower, tower.blocks, *sizes, blocks=blocks))
    return tuple(groups)


def _counting(model: nn.Module, family: Family, tower: Tower) -> list[int]:
    """Where not all blocks have an attention over the tokens, the first that has it: the cache counts them there."""
    counts = next((part for part in tower.parts if isinstance(part, Attention) and part.optional), None)
    layers = range(live_blocks(model, family, tower)) if counts else ()
    return [layer for layer in layers if counts in parts_of(model, family, tower, layer)][:1]


def weigh(tower: Tower, blocks: Iterable[nn.Module]) -> tuple[int, int]:
    """(parameters, weights of linears) that leave with `blocks`; what the first hands on to the next stays."""
    parameters = macs = 0
    for block in blocks:
        parameters += count_parameters(block)
        macs += met_weights(block)
        table = tower.first and getattr(block.get_submodule(tower.first[0]), tower.first[1], None)
        parameters -= table.weight.numel() if table else 0
    return parameters, macs


def live_blocks(model: nn.Module, family: Family, tower: Tower) -> int:
    """Number of blocks of `tower` up to the last one whose output is read."""
    count = len(resolve(model, tower.blocks, family))
    states = read_states(model.config, tower, count)
    return min(max(1, *states), count) if states else count


def depths_of(model: nn.Module, family: Family) -> dict[str, int]:
    """Tower name -> number of blocks, without those whose output nobody reads."""
    return {tower.name: live_blocks(model, family, tower) for tower in family.towers}


def read_states(config: object, tower: Tower, blocks: int) -> list[int]:
    """Indices of the hidden states of `tower` that are read, 0 to `blocks`; empty: the output of the last block is."""
    states = getattr(config, tower.states) if tower.states else []
    return [state if state >= 0 else blocks + 1 + state for state in ([states] if isinstance(states, int) else states)]


def dead_blocks(model: nn.Module, family: Family) -> dict[str, Dead]:
    """The dead blocks by tower; towers without any are left out."""
    found = {}
    for tower in family.towers:
        blocks = resolve(model, tower.blocks, family)[live_blocks(model, family, tower) :]
        if len(blocks):
            found[tower.name] = Dead(len(blocks), *weigh(tower, blocks))
    return found


def _attention_group(
    model: nn.Module, family: Family, where: tuple[Tower, int, Attention], attention_unit: str
) -> Group:
    tower, layer, attention = where
    path = f"{tower.blocks}.{layer}.{attention.module}"
    members, (heads, kv_heads, head_dim) = attention_members(model, family, path, attention)
    unit = _attention_unit(heads, kv_heads, attention_unit)
    num_units = {"head": heads, "kv-group": kv_heads, "query-slot": heads // kv_heads}[unit]
    group = Group(tower, layer, attention, path, heads, unit, num_units, 0, 0, members, kv_heads, head_dim)
    return _weighed(model, family, group)


def _attention_unit(heads: int, kv_heads: int, asked: str) -> str:
    if heads == kv_heads:
        return "head"
    if asked == "auto":
        return "kv-group" if kv_heads >= MIN_KV_HEADS else "query-slot"
    return asked


def _mlp_group(model: nn.Module, family: Family, tower: Tower, layer: int, mlp: Mlp) -> Group:
    path = f"{tower.blocks}.{layer}"
    members, size = mlp_members(model, family, path, mlp)
    return _weighed(model, family, Group(tower, layer, mlp, path, size, "channel", size, 0, 0, members))


def _experts_group(model: nn.Module, family: Family, tower: Tower, layer: int, part: Experts) -> Group:
    path = f"{tower.blocks}.{layer}.{part.module}"
    members, count, width = expert_members(model, family, path)
    share = resolve(model, path, family).share
    sizes = (count * width, "channel-slot", width, 0, 0)
    return _weighed(model, family, Group(tower, layer, part, path, *sizes, members, kv_heads=count, share=share))


def _weighed(model: nn.Module, family: Family, group: Group) -> Group:
    """`group` with what one of its equal units owns: (weights, weights and biases and norm entries)."""
    weights = extras = 0
    for member in group.members:
        if group.slots and member.heads == "kv":
            continue  # a query slot takes query heads only; keys and values stay
        module = resolve(model, member.path, family)
        lines = len(group.indices_of(member)) * member.width
        if member.norm:
            extras += lines * module.weight[:1].numel()
        else:
            weights += lines * module.weight.shape[1 - member.dim]
            extras += lines if member.dim == 0 and module.bias is not None else 0
    each = weights // group.num_units, (weights + extras) // group.num_units
    return replace(group, weights_per_unit=each[0], parameters_per_unit=each[1])


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
