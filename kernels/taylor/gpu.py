"""Saliency sums in Triton: many matrices in one launch, every operand read once, no atomics (so results repeat).

The matrices of a launch stand in a table of addresses, sizes and strides; a program finds its own by its index. It
reduces BLOCK_N survivors over its share of the other dimension; shares are added up at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimvlm.kernels.launching import VECTOR_BYTES, aligned, launch

if TYPE_CHECKING:
    from slimvlm.kernels.taylor import Operands

FIELDS: tl.constexpr = tl.constexpr(16)  # of a matrix in the table; 13 are used
Kind = tuple[str, int, tuple[object, ...]]  # layout, elements of a vector (1: none), Triton's dtypes
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Survivors of a program: along rows few and the loop runs through memory, across rows a segment of a row.
SURVIVORS = {"along": 4, "across": 128, "strided": 32}
PROGRAMS_PER_PROCESSOR = 16  # of 4 warps each: as many as a processor holds
SETTINGS = {"TILE": 2048, "num_warps": 4}


@triton.jit(do_not_specialize=["total"])
def saliency_kernel(
    table, tiles, partial, total, VARIANT: tl.constexpr, LAYOUT: tl.constexpr, WEIGHT: tl.constexpr,
    GRAD: tl.constexpr, SQUARE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """BLOCK_N survivors of one matrix, over one share of the other dimension."""
    BLOCK_M: tl.constexpr = TILE // BLOCK_N // (2 if LAYOUT == "strided" else 1)  # addresses take registers there
    row = table + tl.load(tiles + tl.program_id(0)).to(tl.int64) * FIELDS
    n = tl.load(row + 3) * (ALIGN if LAYOUT == "across" else 1)
    m = tl.load(row + 4) * (ALIGN if LAYOUT == "along" else 1)
    survivors = (tl.program_id(0) - tl.load(row + 12)) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.cdiv(tl.cdiv(m, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    start = tl.program_id(1) * chunk
    sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for base in range(start, tl.minimum(start + chunk, m), BLOCK_M):
        reduced = base + tl.arange(0, BLOCK_M)
        inside = (survivors < n)[:, None] & (reduced < m)[None, :]
        weight = _read(table, row, 0, survivors, reduced, inside, WEIGHT, LAYOUT, ALIGN)
        saliency = weight
        if VARIANT != "second":
            saliency = weight * _read(table, row, 1, survivors, reduced, inside, GRAD, LAYOUT, ALIGN)
        if VARIANT == "second":
            saliency = weight * _read(table, row, 2, survivors, reduced, inside, SQUARE, LAYOUT, ALIGN) * weight
        if VARIANT == "mix":
            saliency -= 0.5 * weight * _read(table, row, 2, survivors, reduced, inside, SQUARE, LAYOUT, ALIGN) * weight
        if VARIANT == "fisher":
            saliency = saliency * saliency
        if VARIANT == "first" or VARIANT == "second" or VARIANT == "mix":
            saliency = tl.abs(saliency)
        sums += saliency
    place = tl.program_id(1).to(tl.int64) * total + tl.load(row + 11) + survivors
    tl.store(partial + place, tl.sum(sums, 1), mask=survivors < n)


@triton.jit
def _read(
    table, row, OPERAND: tl.constexpr, survivors, reduced, inside, TYPE: tl.constexpr, LAYOUT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile of an operand, widened; nothing is 0, which adds nothing."""
    distance = tl.load(row + OPERAND) * (16 if ALIGN > 1 else 1)
    pointer = (table.to(tl.pointer_type(tl.int8)) + distance).to(tl.pointer_type(TYPE))
    per_n, per_m = tl.load(row + 5 + 2 * OPERAND), tl.load(row + 6 + 2 * OPERAND)
    if LAYOUT == "along":
        places = survivors[:, None] * (per_n * ALIGN) + reduced[None, :]
    elif LAYOUT == "across":
        places = survivors[:, None] + reduced[None, :] * (per_m * ALIGN)
    else:
        places = survivors[:, None] * per_n + reduced[None, :] * per_m
    return tl.load(pointer + places, mask=inside, other=0).to(tl.float32)


def saliency_sums(batch: Sequence[Operands], variant: str) -> list[Tensor]:
    """As the reference; one launch per combination of dtypes and layout."""
    kinds: dict[Kind, list[int]] = {}
    for index, operands in enumerate(batch):
        kinds.setdefault(_kind(operands), []).append(index)
    results: list[Tensor] = [torch.empty(0)] * len(batch)
    for kind, indices in kinds.items():
        sums = _launch([batch[index] for index in indices], kind, variant)
        for index, result in zip(indices, sums, strict=True):
            results[index] = result
    return results


def _kind(operands: Operands) -> Kind:
    """What the matrices of one launch share."""
    tensors = [tensor for tensor in operands[:3] if tensor is not None]
    steps = {(tensor.stride(operands.dim), tensor.stride(1 - operands.dim)) for tensor in tensors}
    layout = "strided"
    if all(reduced == 1 for _, reduced in steps):
        layout = "along"
    elif all(survivor == 1 for survivor, _ in steps):
        layout = "across"
    align = 1
    if layout != "strided" and aligned(*tensors):
        align = VECTOR_BYTES // min(tensor.element_size() for tensor in tensors)
    types = tuple(TYPES[(operands.weight if tensor is None else tensor).dtype] for tensor in operands[:3])
    return layout, align, types


def _launch(batch: Sequence[Operands], kind: Kind, variant: str) -> list[Tensor]:
    layout, align, (weight, grad, square) = kind
    device = batch[0].weight.device
    block = SURVIVORS[layout]
    lengths = [operands.weight.shape[operands.dim] for operands in batch]
    blocks = [triton.cdiv(length, block) for length in lengths]
    total, programs = sum(lengths), sum(blocks)
    if not programs:
        return [torch.zeros(0, device=device) for _ in batch]
    table = torch.empty(len(batch), FIELDS.value, dtype=torch.int64, device=device)
    numbers = _table(batch, lengths, blocks, (layout, align, table.data_ptr()))
    table.copy_(torch.tensor(numbers), non_blocking=True)
    counts = torch.tensor(blocks).to(device, non_blocking=True)
    tiles = torch.repeat_interleave(
        torch.arange(len(batch), dtype=torch.int32, device=device), counts, output_size=programs
    )
    longest = max(operands.weight.shape[1 - operands.dim] for operands in batch)
    splits = _splits(programs, longest, device)
    partial = torch.empty(splits, total, device=device)
    arguments = {
        "table": table, "tiles": tiles, "partial": partial, "total": total, "VARIANT": variant, "LAYOUT": layout,
        "WEIGHT": weight, "GRAD": grad, "SQUARE": square, "ALIGN": align, "BLOCK_N": block,
    }  # fmt: skip
    launch(saliency_kernel, (programs, splits), arguments | SETTINGS, device)
    sums = partial[0] if splits == 1 else partial.sum(0)
    return list((sums.abs_() if variant == "vectorized" else sums).split(lengths))


def _table(
    batch: Sequence[Operands], lengths: Sequence[int], blocks: Sequence[int], frame: tuple[str, int, int]
) -> list[list[int]]:
    """Per matrix: three addresses, survivors, reduced length, three pairs of strides, first output, first program.

    The compiler only moves whole vectors if it can prove alignment, and it believes an argument's address and a product
    with a constant, not a number that it loads. So addresses are distances from the table's own, and what is a multiple
    of a vector is stored divided by it.
    """
    layout, align, origin = frame
    rows, output, program = [], 0, 0
    unit = VECTOR_BYTES if align > 1 else 1
    per_n, per_m = (align if layout == "along" else 1), (align if layout == "across" else 1)
    for operands, length, count in zip(batch, lengths, blocks, strict=True):
        tensors = [operands.weight if tensor is None else tensor for tensor in operands[:3]]
        row = [(tensor.data_ptr() - origin) // unit for tensor in tensors]
        row += [length // per_m, operands.weight.shape[1 - operands.dim] // per_n]
        for tensor in tensors:
            row += [tensor.stride(operands.dim) // per_n, tensor.stride(1 - operands.dim) // per_m]
        row += [output, program]
        rows.append(row + [0] * (FIELDS.value - len(row)))
        output, program = output + length, program + count
    return rows


def _splits(programs: int, longest: int, device: torch.device) -> int:
    """Shares of the reduced dimension: enough programs to fill the device, none with less than 512 elements to add."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, programs), triton.cdiv(longest, 512)))
