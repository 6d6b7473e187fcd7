"""From the vectors of a group's members to one value per unit: channels, heads, query slots."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimvlm.compress.models.groups import Group, Member


def unit_sums(
    group: Group, saliency: Callable[[Member], Tensor], dims: tuple[int, ...] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """(saliency [num_units] summed over the weights of a unit, the units' indices [num_units, m]).

    Args:
        saliency: of a member, over the rows or columns of its full tensor.
        dims: members that lose rows (0), columns (1).
    """
    scored = [member for member in group.members if member.dim in dims and not member.norm]
    own = (_per_index(group, member, saliency(member)) for member in scored if _own(member))
    query = sum(own, torch.zeros(()))
    units = units_of(group, query)
    sums = query[units].sum(1)
    if group.unit != "query-slot":
        # A unit that is a head or a KV group takes its own key and value head along, and unit i is KV head i.
        for member in scored:
            if not _own(member):
                sums = sums + _per_index(group, member, saliency(member))
    return sums, units


def _own(member: Member) -> bool:
    return member.heads != "kv"


def _per_index(group: Group, member: Member, vector: Tensor) -> Tensor:
    """Sum of a full-tensor vector over the rows or columns of each channel, query head or KV head: fp64 [count]."""
    return rows_of(group, member, vector).sum(1)


def rows_of(group: Group, member: Member, vector: Tensor) -> Tensor:
    """The entries of one member, [channels or heads, width], fp64."""
    count = (group.kv_heads if member.heads == "kv" else group.size) * member.width
    if len(vector) != count * member.parts:
        raise ValueError(
            f"{group.key}: statistics of {member.path} have {len(vector)} entries, not {count * member.parts}"
        )
    return vector[member.part * count : (member.part + 1) * count].double().view(-1, member.width)


def units_of(group: Group, importance: Tensor) -> Tensor:
    """Indices of every unit, int64 [num_units, m]; `importance` [size] ranks the heads of query slots."""
    if group.unit == "query-slot":
        by_kv_head = importance.view(group.kv_heads, group.heads_per_kv)
        first = torch.arange(group.kv_heads) * group.heads_per_kv
        return (by_kv_head.argsort(dim=1, stable=True) + first[:, None]).t().contiguous()
    indices = torch.tensor([block.index for block in group.blocks]) if group.blocks else torch.arange(group.size)
    return indices.view(group.num_units, -1)
