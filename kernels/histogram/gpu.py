"""Angle histogram in Triton: CHANNELS channels x a share of the tokens per program, counted in registers.

A thread loads 8 neighbouring channels of a token; splitting the tile leaves one vector of tokens per channel without
moving data, and `tl.histogram` counts it by ballots. Only the finished counts go to memory, by atomic integer adds, so
they are exact and the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimvlm.kernels.histogram.reference import NORM_FLOOR
from slimvlm.kernels.launching import VECTOR_BYTES, aligned, launch

CHANNELS = tl.constexpr(8)
FLOOR = tl.constexpr(NORM_FLOOR)
PROGRAMS_PER_PROCESSOR = 16
LANES = 64  # of the widest warp (AMD); every lane gets at least one bin
SETTINGS = {"BLOCK_T": 256, "num_warps": 4}  # twice the tokens spill on sm_100


@triton.jit(do_not_specialize=["tokens", "rows", "bins", "per_token", "share"])
def histogram_kernel(
    outputs, lengths, widths, bias, mask, counts, tokens, rows, bins, per_token, per_channel, share,
    DROP: tl.constexpr, ALIGN: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Eight channels, `share` tokens. SLOTS: a power of two above `bins`; what does not count goes to slot `bins`."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    rows, per_token = rows * ALIGN, per_token * ALIGN
    there = channel < rows
    width = tl.maximum(tl.load(widths + channel, mask=there, other=1).to(tl.float32), FLOOR)
    scale = 0.5 * bins / width
    shift = tl.zeros([CHANNELS], dtype=tl.float32)
    if bias is not None:
        shift = tl.load(bias + channel, mask=there, other=0).to(tl.float32)
    slots = tl.arange(0, SLOTS)
    zero = tl.zeros([SLOTS], dtype=tl.int32)
    c0, c1, c2, c3, c4, c5, c6, c7 = zero, zero, zero, zero, zero, zero, zero, zero
    start = tl.program_id(1).to(tl.int64) * share
    for base in range(start, tl.minimum(start + share, tokens), BLOCK_T):
        token = base + tl.arange(0, BLOCK_T)
        valid = token < tokens
        if mask is not None:
            valid = valid & (tl.load(mask + token, mask=valid, other=0) != 0)
        length = tl.maximum(tl.load(lengths + token, mask=valid, other=1).to(tl.float32), FLOOR)
        places = token[:, None] * per_token + channel[None, :] * per_channel
        inside = valid[:, None] & there[None, :]
        value = tl.load(outputs + places, mask=inside, other=0).to(tl.float32) - shift[None, :]
        position = value / length[:, None] * scale[None, :] + 0.5 * bins
        inside = inside & (position == position)
        if DROP:
            inside = inside & (position >= 0) & (position <= bins)
        index = tl.minimum(tl.maximum(position, 0.0), bins - 1.0).to(tl.int32)
        index = tl.where(inside, index, bins)
        i0, i1, i2, i3, i4, i5, i6, i7 = _channels(index, BLOCK_T)
        c0 += tl.histogram(i0, SLOTS)
        c1 += tl.histogram(i1, SLOTS)
        c2 += tl.histogram(i2, SLOTS)
        c3 += tl.histogram(i3, SLOTS)
        c4 += tl.histogram(i4, SLOTS)
        c5 += tl.histogram(i5, SLOTS)
        c6 += tl.histogram(i6, SLOTS)
        c7 += tl.histogram(i7, SLOTS)
    row = tl.program_id(0).to(tl.int64) * CHANNELS
    _add(counts, row + 0, rows, bins, slots, c0)
    _add(counts, row + 1, rows, bins, slots, c1)
    _add(counts, row + 2, rows, bins, slots, c2)
    _add(counts, row + 3, rows, bins, slots, c3)
    _add(counts, row + 4, rows, bins, slots, c4)
    _add(counts, row + 5, rows, bins, slots, c5)
    _add(counts, row + 6, rows, bins, slots, c6)
    _add(counts, row + 7, rows, bins, slots, c7)


@triton.jit
def _channels(index, BLOCK_T: tl.constexpr):
    """The 8 columns of a tile, each a vector of tokens; a thread holds whole rows, so nothing moves."""
    even, odd = tl.split(tl.reshape(index, [BLOCK_T, 4, 2]))
    a, b = tl.split(tl.reshape(even, [BLOCK_T, 2, 2]))
    c, d = tl.split(tl.reshape(odd, [BLOCK_T, 2, 2]))
    i0, i4 = tl.split(a)
    i2, i6 = tl.split(b)
    i1, i5 = tl.split(c)
    i3, i7 = tl.split(d)
    return i0, i1, i2, i3, i4, i5, i6, i7


@triton.jit
def _add(counts, row, rows, bins, slots, found):
    found = found.to(counts.dtype.element_ty)
    tl.atomic_add(counts + row * bins + slots, found, mask=(row < rows) & (slots < bins) & (found > 0), sem="relaxed")


def angle_histogram(
    outputs: Tensor,
    norms: tuple[Tensor, Tensor],
    bias: Tensor | None,
    counts: Tensor,
    mask: Tensor | None,
    drop_outside: bool,
) -> None:
    """As the reference, but NaN is not counted."""
    tokens, rows = outputs.shape
    bins = counts.shape[1]
    if not tokens or not rows:
        return
    lengths, widths = norms
    align = VECTOR_BYTES // outputs.element_size() if outputs.stride(1) == 1 and aligned(outputs) else 1
    target = counts if counts.is_contiguous() else torch.zeros_like(counts, memory_format=torch.contiguous_format)
    programs = triton.cdiv(rows, CHANNELS.value)
    share = _share(tokens, programs, outputs.device) * SETTINGS["BLOCK_T"]
    arguments = {
        "outputs": outputs, "lengths": lengths.contiguous(), "widths": widths.contiguous(),
        "bias": None if bias is None else bias.contiguous(),
        "mask": None if mask is None else mask.contiguous().view(torch.uint8), "counts": target, "tokens": tokens,
        "rows": rows // align, "bins": bins, "per_token": outputs.stride(0) // align,
        "per_channel": outputs.stride(1), "share": share, "DROP": drop_outside, "ALIGN": align,
        "SLOTS": max(LANES, triton.next_power_of_2(bins + 1)),
    }  # fmt: skip
    launch(histogram_kernel, (programs, triton.cdiv(tokens, share)), arguments | SETTINGS, outputs.device)
    if target is not counts:
        counts += target


def _share(tokens: int, programs: int, device: torch.device) -> int:
    """Blocks of tokens per program: as few programs as fill the device, since each adds all its counts to memory."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    blocks = triton.cdiv(tokens, SETTINGS["BLOCK_T"])
    return triton.cdiv(blocks, max(1, PROGRAMS_PER_PROCESSOR * processors // programs))
