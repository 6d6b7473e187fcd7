"""Which rows and columns of which tensors leave with a group's units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.families import Experts, Family
from slimvlm.compress.models.groups import Group, dead_blocks, find_blocks, find_groups
from slimvlm.compress.models.projections import Member
from slimvlm.compress.plan import BLOCK, Plan


@dataclass(frozen=True, slots=True)
class Cut:
    """What one module keeps: sorted rows and columns (None: all), int64. `scale` multiplies what a norm keeps."""

    path: str
    rows: Tensor | None = None
    columns: Tensor | None = None
    scale: float = 1.0


def find_cuts(group: Group, kept: Tensor) -> Iterator[Cut]:
    """What the modules of `group` keep when the sorted indices `kept` stay; untouched modules are left out."""
    if len(kept) == group.size:
        return
    kv_cut = group.kv_heads > 0 and len(kept_kv_heads(group, kept)) < group.kv_heads
    for path in dict.fromkeys(member.path for member in group.members):
        members = [member for member in group.members if member.path == path]
        first = members[0]
        if first.heads == "kv" and not kv_cut:
            continue
        index = torch.cat([member_indices(group, member, kept) for member in members])
        if first.dim == 1:
            yield Cut(path, columns=index)
        else:
            full = (group.kv_heads if first.heads == "kv" else group.size) * first.width
            # The RMS of the removed entries is zero: the mean over fewer entries is larger by full / kept.
            yield Cut(path, rows=index, scale=(full / len(index)) ** 0.5 if first.norm and first.width > 1 else 1.0)


def matching_groups(model: nn.Module, family: Family, plan: Plan) -> tuple[Group, ...]:
    """The groups of the dense `model`, after checking that `plan` was made for them.

    Raises:
        CheckpointError: the plan was made for another model.
    """
    if plan.family not in (family.name, *family.former):
        raise CheckpointError(f"the plan is for family {plan.family!r}, this model is {family.name!r}")
    kinds = {key.endswith(f".{BLOCK}") for key in plan.keep}
    groups = tuple(
        group
        for group in (*find_blocks(model, family), *find_groups(model, family, plan.attention_unit))
        if (group.kind == BLOCK) in kinds and (group.kind == BLOCK or plan.keeps(group.tower, group.layer))
    )
    dead = {tower: one.blocks for tower, one in dead_blocks(model, family).items()}
    if dead != dict(plan.dropped):
        raise CheckpointError(
            f"the plan drops {dict(plan.dropped)} blocks that nobody reads, this model has {dead}; "
            "apply the plan to the checkpoint it was made for"
        )
    if unknown := sorted(set(plan.keep) ^ {group.key for group in groups}):
        raise CheckpointError(f"the plan and the model do not have the same groups; first difference: {unknown[0]}")
    for group in groups:
        if plan.sizes[group.key] != group.size:
            raise CheckpointError(
                f"group {group.key} has {group.size} indices in this model, {plan.sizes[group.key]} in the plan; "
                "apply the plan to the checkpoint it was made for"
            )
        if fixed := set(group.fixed) - set(plan.keep[group.key]):
            raise CheckpointError(f"block {min(fixed)} of {group.tower} cannot leave: other parts count on its place")
    return groups


def complement(kept: Tensor, size: int) -> Tensor:
    """The sorted indices below `size` that are not `kept`."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[kept] = False
    return mask.nonzero().flatten()


def kept_kv_heads(group: Group, kept: Tensor) -> Tensor:
    """The KV heads that stay when the query heads `kept` (sorted int64) stay; or experts, whose channels these are.

    Raises:
        ValueError: the kept KV heads would have different numbers of query heads, or the experts of channels.
    """
    kv: Tensor
    kv, counts = torch.unique(kept // group.heads_per_kv, return_counts=True)
    if isinstance(group.part, Experts) and (len(set(counts.tolist())) > 1 or len(kv) < group.kv_heads):
        raise ValueError(f"{group.key}: every expert must keep the same number of channels, and one at least")
    if len(set(counts.tolist())) > 1:
        raise ValueError(
            f"{group.key}: every kept KV head must keep the same number of query heads, got {counts.tolist()}"
        )
    return kv


def member_indices(group: Group, member: Member, kept: Tensor) -> Tensor:
    """Rows (dim 0) or columns (dim 1) of `member`'s tensor that stay, int64, sorted.

    Where it shares the tensor with others these are its own rows only.

    Args:
        kept: sorted indices of the group that stay (channels or query heads), int64.
    """
    index, own = kept_kv_heads(group, kept) if member.heads == "kv" else kept, group.indices_of(member)
    index = index[(index >= own.start) & (index < own.stop)] - own.start
    if member.width > 1:
        index = (index[:, None] * member.width + torch.arange(member.width)).flatten()
    return index + member.start
