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
from dataclasses import dataclass
from operator import attrgetter
from typing import Any  # attributes of modules, which torch types as tensors or modules

import numpy as np
from numpy.typing import NDArray
from torch import nn

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.families import Attention, Family, Mlp, Tower
from slimvlm.compress.options import ATTENTION_UNITS
from slimvlm.compress.plan import BLOCK

MIN_KV_HEADS = 4  # below this, cutting whole KV groups is too coarse: `auto` cuts query slots


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor side of a group.

    Attributes:
        path: the linear (or norm) module.
        dim: 0 if it loses rows (and the bias entries of those rows), 1 if it loses columns.
        heads: `query`, `kv`, or `channel`: which index list selects.
        width: rows or columns per index (D for heads, 1 for channels).
        part, parts: a fused qkv is `parts` = 3 row blocks, one member each.
        norm: a norm of the heads, which carries no score. One over all of them loses entries and is rescaled; one with
            a row per head (of width 1) loses rows.
    """

    path: str
    dim: int
    heads: str
    width: int = 1
    part: int = 0
    parts: int = 1
    norm: bool = False


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
        path: attention module, the block of an MLP, or the list of blocks.
        size: indices: channels I of an MLP, query heads H of an attention, blocks that are not dead.
        unit: `channel`, `head`, `kv-group`, `query-slot` or `block`; num_units of them.
        weights_per_unit: weights one unit owns (biases not counted): the divisor of the block-wise normaliser.
        parameters_per_unit: weights and biases that leave with one unit (of blocks, the mean; they differ).
        kv_heads, head_dim: K and D of an attention; 0 and 1 for an MLP.
        blocks: what may leave, one block per unit; empty for groups of another kind.
    """

    home: Tower
    layer: int
    part: Attention | Mlp | Tower
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

    @property
    def tower(self) -> str:
        return self.home.name

    @property
    def modality(self) -> str:
        return self.home.modality

    @property
    def kind(self) -> str:
        """`attention`, `mlp` or `block`."""
        return {Attention: "attention", Mlp: "mlp", Tower: BLOCK}[type(self.part)]

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
        """Multiply-accumulates per token of each unit's linears: equal to their weights; int64 [num_units]."""
        if self.blocks:
            return np.array([block.macs for block in self.blocks])
        return np.full(self.num_units, self.weights_per_unit)

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
    def indices_per_unit(self) -> int:
        return 1 if self.blocks else self.size // self.num_units

    @property
    def heads_per_kv(self) -> int:
        """Query heads per KV head (1 for plain multi-head attention and MLPs)."""
        return self.size // self.kv_heads if self.kv_heads else 1


def find_units(model: nn.Module, family: Family, kind: str, attention_unit: str = "auto") -> tuple[Group, ...]:
    """The groups with units of this kind: `width` (see `find_groups`) or `block` (see `find_blocks`)."""
    return find_blocks(model, family) if kind == BLOCK else find_groups(model, family, attention_unit)


def find_groups(
    model: nn.Module, family: Family, attention_unit: str = "auto", dead: bool = False
) -> tuple[Group, ...]:
    """All prunable groups of `model`, in table order. Reads shapes only: meta is enough.

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
    groups = []
    for tower in family.towers:
        blocks = resolve(model, tower.blocks, family)
        for layer in range(len(blocks) if dead else live_blocks(model, family, tower)):
            for part in tower.parts:
                if isinstance(part, Attention):
                    groups.append(_attention_group(model, family, (tower, layer, part), attention_unit))
                else:
                    groups.append(_mlp_group(model, family, tower, layer, part))
    return tuple(groups)


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
        stays = set(fixed if tower.modality == "vision" else range(len(fixed)))
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


def weigh(tower: Tower, blocks: Iterable[nn.Module]) -> tuple[int, int]:
    """(parameters, weights of linears) that leave with `blocks`; what the first hands on to the next stays."""
    parameters = macs = 0
    for block in blocks:
        parameters += count_parameters(block)
        macs += sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
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


def resolve(model: nn.Module, path: str, family: Family) -> Any:
    """The submodule at `path`.

    Raises:
        UnsupportedModelError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module {path!r}, which family {family.name!r} needs; "
            "this transformers version or architecture variant is not supported"
        ) from None


def _attention_group(
    model: nn.Module, family: Family, where: tuple[Tower, int, Attention], attention_unit: str
) -> Group:
    tower, layer, attention = where
    path = f"{tower.blocks}.{layer}.{attention.module}"
    module = resolve(model, path, family)
    rows = [resolve(module, name, family) for name in attention.rows]
    fused = len(rows) == 1
    head_dim = _head_dim(module, attention, rows[0].weight.shape[0] // (3 if fused else 1))
    heads = rows[0].weight.shape[0] // head_dim // (3 if fused else 1)
    kv_heads = heads if fused else rows[1].weight.shape[0] // head_dim
    if fused:
        names = [(attention.rows[0], part, 3, "query") for part in range(3)]
    else:
        names = [(name, 0, 1, "query" if i == 0 else "kv") for i, name in enumerate(attention.rows)]
    members = [Member(f"{path}.{name}", 0, kind, head_dim, part, parts) for name, part, parts, kind in names]
    for norm, kind in zip(attention.norms, ("query", "kv"), strict=False):
        if getattr(getattr(module, norm, None), "weight", None) is not None:
            wide = getattr(module, norm).weight.ndim == 1
            members.append(Member(f"{path}.{norm}", 0, kind, head_dim if wide else 1, norm=True))
    members.append(Member(f"{path}.{attention.output}", 1, "query", head_dim))
    unit = _attention_unit(heads, kv_heads, attention_unit)
    num_units = {"head": heads, "kv-group": kv_heads, "query-slot": heads // kv_heads}[unit]
    # A query slot takes query heads only; keys and values stay.
    owned = [m for m in members if unit != "query-slot" or m.heads == "query"]
    sizes = (heads, unit, num_units, *_owned(model, family, owned, num_units))
    return Group(tower, layer, attention, path, *sizes, tuple(members), kv_heads, head_dim)


def _head_dim(module: nn.Module, attention: Attention, width: int) -> int:
    """D, of queries of H * D = `width`."""
    if attention.head_dim:
        return int(getattr(module, attention.head_dim))
    heads = next(name for name, fact in attention.patch if fact == "heads")
    return width // int(getattr(module, heads))


def _attention_unit(heads: int, kv_heads: int, asked: str) -> str:
    if heads == kv_heads:
        return "head"
    if asked == "auto":
        return "kv-group" if kv_heads >= MIN_KV_HEADS else "query-slot"
    return asked


def _mlp_group(model: nn.Module, family: Family, tower: Tower, layer: int, mlp: Mlp) -> Group:
    path = f"{tower.blocks}.{layer}"
    sides = [*((name, 0) for name in mlp.rows), (mlp.output, 1)]
    members = [Member(f"{path}.{name}", dim, "channel") for name, dim in sides]
    size = resolve(model, members[0].path, family).weight.shape[0]
    sizes = (size, "channel", size, *_owned(model, family, members, size))
    return Group(tower, layer, mlp, path, *sizes, tuple(members))


def _owned(model: nn.Module, family: Family, members: list[Member], num_units: int) -> tuple[int, int]:
    """(weights, weights and biases and norm entries) that one of `num_units` equal units owns."""
    weights = extras = 0
    for member in members:
        module = resolve(model, member.path, family)
        if member.norm:
            extras += module.weight.numel()
            continue
        weights += module.weight.numel() // member.parts
        if member.dim == 0 and module.bias is not None:
            extras += module.bias.numel() // member.parts
    return weights // num_units, (weights + extras) // num_units


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
