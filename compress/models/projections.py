"""The projections of one attention, of one MLP, or of the experts of a block: which rows or columns belong to what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any  # attributes of modules, which torch types as tensors or modules

from torch import nn

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.experts import OUTPUT, ROWS
from slimvlm.compress.models.families import Attention, Family, Mlp


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor side of a group.

    Attributes:
        path: the linear (or norm) module.
        dim: 0 if it loses rows (and the bias entries of those rows), 1 if it loses columns.
        heads: `query`, `kv`, or `channel`: which index list selects.
        width: rows or columns per index (D for heads, 1 for channels).
        start: its first row or column, where several projections share a tensor (a fused qkv, gate and up).
        expert: number of the expert whose channels these are; None: they are all of the group's.
        norm: a norm of the heads, which carries no score. One over all of them loses entries and is rescaled; one with
            a row per head (of width 1) loses rows.
    """

    path: str
    dim: int
    heads: str
    width: int = 1
    start: int = 0
    norm: bool = False
    expert: int | None = None


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


def has_module(model: nn.Module, path: str) -> bool:
    """Whether there is a submodule at `path`."""
    try:
        return model.get_submodule(path) is not None
    except AttributeError:
        return False


def attention_members(
    model: nn.Module, family: Family, path: str, attention: Attention
) -> tuple[tuple[Member, ...], tuple[int, int, int]]:
    """(the members of the attention at `path`; query heads H, KV heads K, head size D).

    Raises:
        UnsupportedModelError: it lacks a projection, or one has rows that are no heads.
    """
    module = resolve(model, path, family)
    width = resolve(module, attention.output, family).weight.shape[1]
    head_dim = _head_dim(module, attention, width)
    heads = width // head_dim
    members, kv_heads = _rows(module, family, attention, heads, head_dim)
    for norm, kind in zip(attention.norms, ("query", "kv"), strict=False):
        if getattr(getattr(module, norm, None), "weight", None) is not None:
            wide = getattr(module, norm).weight.ndim == 1
            members.append(Member(norm, 0, kind, head_dim if wide else 1, norm=True))
    members.append(Member(attention.output, 1, "query", head_dim))
    return tuple(replace(one, path=f"{path}.{one.path}") for one in members), (heads, kv_heads, head_dim)


def mlp_members(model: nn.Module, family: Family, path: str, mlp: Mlp) -> tuple[tuple[Member, ...], int]:
    """(the members of an MLP of the block at `path`, its channels I). Raises as of an attention."""
    size = resolve(model, f"{path}.{mlp.output}", family).weight.shape[1]
    rows = [
        Member(f"{path}.{name}", 0, "channel", start=start)
        for name in mlp.rows
        for start in range(0, len(resolve(model, f"{path}.{name}", family).weight), size)  # gate and up may be in one
    ]
    return (*rows, Member(f"{path}.{mlp.output}", 1, "channel")), size


def expert_members(model: nn.Module, family: Family, path: str) -> tuple[tuple[Member, ...], int, int]:
    """(the members of the experts at `path`, which are apart, one after the other; their number; channels of each)."""
    experts = resolve(model, path, family)
    width = resolve(experts, f"0.{OUTPUT}", family).weight.shape[1]
    members: list[Member] = []
    for expert in range(len(experts)):
        rows = (Member(f"{path}.{expert}.{ROWS}", 0, "channel", 1, start, expert=expert) for start in (0, width))
        members += [*rows, Member(f"{path}.{expert}.{OUTPUT}", 1, "channel", expert=expert)]
    return tuple(members), len(experts), width


def _rows(
    module: nn.Module, family: Family, attention: Attention, heads: int, head_dim: int
) -> tuple[list[Member], int]:
    """(q, k and v, in one linear, two or three, by their paths in `module`; the number of KV heads)."""
    sizes = {name: len(resolve(module, name, family).weight) for name in attention.rows}
    query = sizes[attention.rows[0]] // heads if len(sizes) > 1 else head_dim  # wider where a gate lies beside it
    kv_heads = (sum(sizes.values()) - heads * query) // (2 * head_dim)
    parts = [("query", heads, query), ("kv", kv_heads, head_dim), ("kv", kv_heads, head_dim)]
    members = []
    for name, size in sizes.items():
        start = 0
        while parts and start < size:
            kind, count, width = parts.pop(0)
            members.append(Member(name, 0, kind, width, start))
            start += count * width
        if start != size:
            raise UnsupportedModelError(
                f"{type(module).__name__}.{name} has {size} rows, which are no projections of {heads} heads of "
                f"{head_dim}; family {family.name!r} cannot cut it"
            )
    return members, kv_heads


def _head_dim(module: nn.Module, attention: Attention, width: int) -> int:
    """D, of queries of H * D = `width`."""
    if attention.head_dim:
        return int(getattr(module, attention.head_dim))
    heads = next(name for name, fact in attention.patch if fact == "heads")
    return width // int(getattr(module, heads))
