"""Attentions and MLPs among the linears of a block, told by what changes when one output of them does.

An MLP's channel changes the same channel of what reads it, at its own position. A query changes its head at its own
position; a key its heads at other positions, too; a value one column of its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from slimvlm.compress.models.discovery.probing import OUTSIDE, PLACE, Probe
from slimvlm.compress.models.families import Attention, Mlp

Part = Attention | Mlp
ASKED = (("num_attention_heads", "heads"), ("num_key_value_heads", "kv_heads"))  # of the config, while it computes


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of an attention, measured: query heads, KV heads, and the width of one."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def per_kv(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Candidate:
    """A part to be proved, and the other ways to patch its attributes, should the first not do."""

    part: Part
    linears: frozenset[str]
    heads: Heads | None = None
    patches: tuple[tuple[tuple[str, str], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class NotUnderstood:
    """Linears of a block that are no group known here, and why."""

    linears: frozenset[str]
    why: str


def recognise(probe: Probe) -> Iterator[Candidate | NotUnderstood]:
    """What the linears of a block are; each is named once."""
    reads = {path: probe.readers(path) for path in probe.linears if path in probe.once}
    inner = {path: seen for path, seen in reads.items() if OUTSIDE not in seen}  # the others add to the residual stream
    normed = {
        norm: path
        for path, seen in inner.items()
        for norm in seen
        if norm in probe.norms and _is_wide(probe, path, norm)
    }
    probe.hold(normed)
    named: set[str] = set()
    for reader in reads:
        sources = {path: path for path, seen in inner.items() if reader in seen and path not in normed.values()}
        sources |= {path: norm for norm, path in normed.items() if reader in probe.readers(norm)}
        if not sources:
            continue
        linears = frozenset((*sources, reader))
        try:
            if any(set(inner[path]) - {reader, *normed} & probe.linears.keys() for path in sources) or linears & named:
                raise ValueError("what one of them gives is read in two places")
            yield _candidate(probe, sources, reader)
        except ValueError as error:
            yield NotUnderstood(linears, str(error))
        named |= linears
    for path in probe.linears.keys() - named:
        never = "it was not called once" if path not in probe.once else "no linear reads it, and it reads none"
        yield NotUnderstood(frozenset((path,)), never)


def _is_wide(probe: Probe, path: str, norm: str) -> bool:
    """Whether `norm` is one over all outputs of the linear `path`, and only over those."""
    width = probe.linears[path].out_features
    whole = probe.norms[norm].weight.shape[0] == width == probe.still[norm].shape[-1]
    return whole and _columns(probe, path, norm, width // 2) == ({PLACE}, {width // 2})


def _columns(probe: Probe, source: str, reader: str, column: int) -> tuple[set[int], set[int]]:
    """Which positions and columns of `reader`'s input change with one output of `source`."""
    seen = probe.readers(source, column).get(reader, torch.zeros(0, 0, dtype=torch.bool))
    positions, columns = (set(one.unique().tolist()) for one in seen.nonzero(as_tuple=True))
    return positions, columns


def _candidate(probe: Probe, sources: dict[str, str], reader: str) -> Candidate:
    """The part whose linears are `sources` (each with the node that gives its outputs) and `reader`.

    Raises:
        ValueError: it is none known here.
    """
    width = probe.linears[reader].in_features
    sizes = {path: probe.linears[path].out_features for path in sources}
    ends = [(node, end) for path, node in sources.items() for end in (0, sizes[path] - 1)]
    local = all(_columns(probe, node, reader, end)[0] == {PLACE} for node, end in ends)
    if local and not any(size % width for size in sizes.values()):
        for path, node in sources.items():  # gate and up may lie in one, one below the other
            for row in {start + channel for start in range(0, sizes[path], width) for channel in (0, width // 3)}:
                if _columns(probe, node, reader, row) != ({PLACE}, {row % width}):
                    raise ValueError(f"{node} and {reader} do not share their channels")
        return Candidate(Mlp(tuple(sources), reader), frozenset((*sources, reader)))
    if local and len(sources) == 1:
        raise ValueError(f"{next(iter(sources))} is fused in a way that no row can say")
    if len(sources) == 1:
        return _fused(probe, next(iter(sources.items())), reader)
    if len(sources) != 3:
        raise ValueError(f"{reader} reads {len(sources)} linears; an attention has 3 or one fused")
    return _separate(probe, sources, reader)


def _separate(probe: Probe, sources: dict[str, str], reader: str) -> Candidate:
    width = probe.linears[reader].in_features
    seen = {path: _columns(probe, node, reader, 0) for path, node in sources.items()}
    queries = [path for path, (positions, _) in seen.items() if positions == {PLACE}]
    if len(queries) != 1:
        raise ValueError(f"none of {', '.join(sources)} is told to be the query")
    head_dim = len(seen[queries[0]][1])
    single = {path for path, (_, columns) in seen.items() if not any(column % head_dim for column in columns)}
    values = [path for path in sources if path in single - {queries[0]}]
    keys = [path for path in sources if path not in (*queries, *values)]
    if len(values) != 1 or head_dim < 2:
        raise ValueError(f"key and value among {', '.join(sources)} are not told apart")
    names = (queries[0], keys[0], values[0])
    heads = Heads(width // head_dim, probe.linears[keys[0]].out_features // head_dim, head_dim)
    nodes = [(sources[path], 0, 1 if path == queries[0] else heads.per_kv) for path in names]
    _check_heads(probe, nodes, reader, heads)
    norms = [sources[path] for path in names if sources[path] != path]
    if norms not in ([], [sources[path] for path in names[:2]]):
        raise ValueError(f"{', '.join(norms)} goes over all heads of one of query and key, or of the value")
    return _attention(probe, (*names, reader), heads, norms)


def _fused(probe: Probe, source: tuple[str, str], reader: str) -> Candidate:
    """Queries, keys and values below each other in one linear."""
    path, node = source
    width, rows = probe.linears[reader].in_features, probe.linears[path].out_features
    head_dim = len(_columns(probe, node, reader, 0)[1])
    if head_dim < 2 or width % head_dim or rows <= width or (rows - width) % (2 * head_dim):
        raise ValueError(f"{path} is fused in a way that no row can say: {rows} rows, {width} of them queries")
    heads = Heads(width // head_dim, (rows - width) // (2 * head_dim), head_dim)
    if heads.heads % heads.kv_heads:
        raise ValueError(f"{path} is fused in a way that no row can say: {heads.heads} heads on {heads.kv_heads}")
    values = (rows + width) // 2
    _check_heads(probe, [(node, 0, 1), (node, width, heads.per_kv), (node, values, heads.per_kv)], reader, heads)
    return _attention(probe, (path, reader), heads, [])


def _check_heads(probe: Probe, nodes: Sequence[tuple[str, int, int]], reader: str, heads: Heads) -> None:
    """Query head h belongs to KV head h // (H / K), and the rows of a head lie together.

    Args:
        nodes: of query, key, value: the node, where its rows begin, and how many query heads one head of it serves.

    Raises:
        ValueError: not so here.
    """
    size = heads.head_dim
    for place, (node, start, serves) in enumerate(nodes):
        count = heads.heads // serves
        for head in {0, count // 2, count - 1}:
            row = head * size + size // 2
            served = range(head * serves, (head + 1) * serves)
            inside = range(size) if place < 2 else (size // 2,)
            expected = {one * size + offset for one in served for offset in inside}
            positions, columns = _columns(probe, node, reader, start + row)
            if columns != expected or (positions == {PLACE}) != (place == 0):
                raise ValueError(f"the heads of {node} lie in another order than rows can say")


def _attention(probe: Probe, linears: tuple[str, ...], heads: Heads, norms: list[str]) -> Candidate:
    steps = takewhile(lambda names: len(set(names)) == 1, zip(*(name.split(".") for name in linears), strict=False))
    prefix = ".".join(names[0] for names in steps)
    module = probe.specimen.block.get_submodule(prefix)
    sized = _named(module, heads.head_dim, lambda name: "dim" in name or "size" in name)
    patch = [(name, fact) for fact, name in _counted(module, heads)]
    if not prefix or not (sized or "heads" in dict(patch).values()):
        raise ValueError(f"no attribute of {prefix or 'the block'} says that its heads have {heads.head_dim} rows")
    short = [name.removeprefix(f"{prefix}.") for name in linears]
    cross = probe.still[linears[0]].shape[0] != probe.still[linears[len(linears) > 3]].shape[0]
    width = [(name, "width") for name in _named(module, heads.heads * heads.head_dim, lambda name: "dim" in name)]
    inner = tuple(norm.removeprefix(f"{prefix}.") for norm in norms)
    part = Attention(
        prefix,
        tuple(short[:-1]),
        short[-1],
        key="cross_attn" if cross else "attn",
        head_dim=min(sized, key=lambda name: (name != "head_dim", name), default=""),
        norms=inner,
        patch=tuple(patch),
    )
    own = getattr(module, "config", None)
    config = own.to_dict() if isinstance(own, PreTrainedConfig) else {}
    asked = [(f"config.{name}", fact) for name, fact in ASKED if config.get(name) == getattr(heads, fact)]
    more: tuple[list[tuple[str, str]], ...] = ([], width, asked, asked[:1])  # what the forward may need besides
    return Candidate(part, frozenset(linears), heads, tuple(dict.fromkeys((*patch, *one) for one in more)))


def _named(module: nn.Module, value: int, fits: Callable[[str], bool]) -> list[str]:
    """Attributes of a module with this value whose names fit."""
    return [name for name, one in vars(module).items() if type(one) is int and one == value and fits(name)]


def _counted(module: nn.Module, heads: Heads) -> Iterator[tuple[str, str]]:
    """(fact, attribute) of the numbers of heads that an attention keeps."""
    values = {"groups": heads.per_kv, "kv_heads": heads.kv_heads, "heads": heads.heads}
    for name, value in vars(module).items():
        if type(value) is int and ("head" in name or "group" in name) and "dim" not in name and "size" not in name:
            if "group" in name:
                fact = "groups"
            elif "kv" in name or "key_value" in name:
                fact = "kv_heads"
            else:
                fact = "heads"
            if values[fact] == value:
                yield fact, name


def index_of(kept: Tensor, size: int, start: int = 0) -> Tensor:
    """Rows or columns of the heads (or channels) `kept`, of `size` each."""
    return (kept[:, None] * size + torch.arange(size)).flatten() + start
