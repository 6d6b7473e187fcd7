"""A part is proved by cutting it: the block without some units must give what it gives with them switched off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from slimvlm.compress.models.discovery.blocks import Specimen
from slimvlm.compress.models.discovery.parts import Candidate, Heads, Part, index_of
from slimvlm.compress.models.families import Attention
from slimvlm.compress.models.modeling_slim import resize, set_attribute

EQUAL = 1e-4  # of the largest output, in fp32
Side = tuple[str, Tensor | None, Tensor | None, float]  # module, rows and columns that stay, factor of a norm


def prove(specimen: Specimen, candidate: Candidate) -> Part:
    """The part of `candidate`, patched so that its cut is right.

    Raises:
        ValueError: no way of patching it makes the cut block equal to the masked one.
    """
    why = ""
    for patch in candidate.patches or ((),):
        part = replace(candidate.part, patch=patch) if isinstance(candidate.part, Attention) else candidate.part
        for kept, heads in _choices(specimen.block, candidate):
            if why := _differs(specimen, part, candidate.heads, kept, heads):
                break
        else:
            return part
    raise ValueError(f"cut and masked block differ: {why}")


def _choices(block: nn.Module, candidate: Candidate) -> Iterator[tuple[Tensor, int]]:
    """Kept indices to try, and how many query heads each kept KV head has then (0: an MLP).

    Raises:
        ValueError: there is nothing to choose among.
    """
    heads = candidate.heads
    if heads is None:
        assert not isinstance(candidate.part, Attention)
        size = block.get_submodule(candidate.part.output).get_parameter("weight").shape[1]
        yield torch.arange(0, size, 2), 0
        return
    if heads.heads == 1:
        raise ValueError("an attention of one head has no unit to remove")
    if heads.kv_heads > 1:
        yield index_of(torch.arange(1, heads.kv_heads, 2), heads.per_kv), heads.per_kv
    if heads.per_kv > 1:
        per_kv = heads.per_kv - 1
        yield (torch.arange(heads.kv_heads)[:, None] * heads.per_kv + torch.arange(1, per_kv + 1)).flatten(), per_kv


def _differs(specimen: Specimen, part: Part, heads: Heads | None, kept: Tensor, per_kv: int) -> str:
    """Why the cut block is not the masked one; empty: it is."""
    sides = list(_sides(specimen.block, part, heads, kept))
    masked, cut = (Specimen(copy.deepcopy(specimen.block), specimen.arguments) for _ in range(2))
    with torch.no_grad():
        for path, rows, columns, factor in sides:
            _mask(masked.block.get_submodule(path), rows, columns)
            _cut(cut.block.get_submodule(path), rows, columns, factor)
    if isinstance(part, Attention):
        assert heads is not None
        facts = {"heads": len(kept), "kv_heads": len(kept) // per_kv, "groups": per_kv}
        facts["width"] = len(kept) * heads.head_dim
        for name, fact in part.patch:
            set_attribute(cut.block.get_submodule(part.module), name, facts[fact])
    dense, expected = specimen.run(), masked.run()
    try:
        found = cut.run()
    except Exception as error:  # somebody else's block, whose code counts on what was cut
        return " ".join(str(error).split())[:120] or type(error).__name__
    if [one.shape for one in expected] != [one.shape for one in found]:
        return "what it hands on has as many entries as it has heads"
    if torch.equal(dense[0], expected[0]):
        return "what was masked is not read"
    largest = max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(found, expected, strict=True)
    )
    return "" if largest <= EQUAL else f"by {largest:.1e} of the largest output"


def _sides(block: nn.Module, part: Part, heads: Heads | None, kept: Tensor) -> Iterator[Side]:
    """What each module keeps."""
    if not isinstance(part, Attention):
        channels = block.get_submodule(part.output).get_parameter("weight").shape[1]
        for path in part.rows:
            starts = range(0, len(block.get_submodule(path).get_parameter("weight")), channels)
            yield path, torch.cat([kept + start for start in starts]), None, 1.0
        yield part.output, None, kept, 1.0
        return
    assert heads is not None
    size, kv = heads.head_dim, torch.unique(kept // heads.per_kv)
    paths = [f"{part.module}.{name}" for name in (*part.rows, part.output)]
    norms = {place: f"{part.module}.{name}" for place, name in enumerate(part.norms)}
    if len(part.rows) == 1:
        keys, values = (size * (heads.heads + one * heads.kv_heads) for one in range(2))
        rows = (index_of(kept, size), index_of(kv, size, keys), index_of(kv, size, values))
        yield paths[0], torch.cat(rows), None, 1.0
    else:
        for place, path in enumerate(paths[:-1]):
            stays, all_heads = (kv, heads.kv_heads) if place else (kept, heads.heads)
            yield path, index_of(stays, size), None, 1.0
            if place in norms:  # the mean of squares is over fewer entries than before
                yield norms[place], index_of(stays, size), None, (all_heads / len(stays)) ** 0.5
    yield paths[-1], None, index_of(kept, size), 1.0


def _mask(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if rows is not None:
        gone = torch.ones(len(weight), dtype=torch.bool)
        gone[rows] = False
        weight[gone] = 0
        if bias is not None:
            bias[gone] = 0
    if columns is not None:
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[columns] = False
        weight[:, gone] = 0


def _cut(module: nn.Module, rows: Tensor | None, columns: Tensor | None, factor: float) -> None:
    weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
    weight = weight if columns is None else weight[:, columns]
    weight = factor * (weight if rows is None else weight[rows])
    resize(module, weight, list(weight.shape), None if bias is None or rows is None else bias.detach()[rows])
