"""Two-sided gather in Triton: values are moved as integers of their size, so every bit arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimvlm.kernels.launching import VECTOR_BYTES, aligned, launch

if TYPE_CHECKING:
    from slimvlm.kernels.gather import Blocks

CARRIERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SETTINGS = {"BLOCK_R": 4, "BLOCK_C": 512, "num_warps": 4}


@triton.jit(do_not_specialize=["height", "width", "per_row"])
def gather_kernel(
    weight, rows, cols, out, height, width, per_row, per_col, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of the result. Rows lie `width * ALIGN` apart in it."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    width *= ALIGN
    row, col = r, c
    if rows is not None:
        row = tl.load(rows + r, mask=r < height, other=0).to(tl.int64)
    if cols is None:
        per_row *= ALIGN
    else:
        col = tl.load(cols + c, mask=c < width, other=0).to(tl.int64)
    inside = (r < height)[:, None] & (c < width)[None, :]
    value = tl.load(weight + row[:, None] * per_row + col[None, :] * per_col, mask=inside)
    tl.store(out + r[:, None] * width + c[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["height", "width", "kept_width", "per_row"])
def blocks_kernel(
    weight, row_places, col_places, kept, pruned_cols, pruned_rows, pruned, height, width, kept_width, per_row, per_col,
    ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A place is the index in the kept part, or -1 - the index in the pruned part."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    width, per_row = width * ALIGN, per_row * ALIGN
    inside = (r < height)[:, None] & (c < width)[None, :]
    value = tl.load(weight + r[:, None] * per_row + c[None, :] * per_col, mask=inside)
    row = tl.load(row_places + r, mask=r < height, other=0).to(tl.int64)[:, None]
    col = tl.load(col_places + c, mask=c < width, other=0).to(tl.int64)[None, :]
    rest = width - kept_width
    tl.store(kept + row * kept_width + col, value, mask=inside & (row >= 0) & (col >= 0))
    tl.store(pruned_cols + row * rest + (-1 - col), value, mask=inside & (row >= 0) & (col < 0))
    tl.store(pruned_rows + (-1 - row) * kept_width + col, value, mask=inside & (row < 0) & (col >= 0))
    tl.store(pruned + (-1 - row) * rest + (-1 - col), value, mask=inside & (row < 0) & (col < 0))


def gather_2d(weight: Tensor, rows: Tensor | None, cols: Tensor | None, out: Tensor) -> None:
    """As the reference."""
    height, width = out.shape
    if not out.numel():
        return
    source, target = _carried(weight), _carried(out)
    whole = aligned(target) and (cols is not None or (source.stride(1) == 1 and aligned(source)))
    align = _align(source) if whole else 1
    arguments: dict[str, object] = {
        "weight": source, "rows": rows, "cols": cols, "out": target, "height": height, "width": width // align,
        "per_row": source.stride(0) // (align if cols is None else 1), "per_col": source.stride(1), "ALIGN": align,
    }  # fmt: skip
    launch(gather_kernel, _grid(height, width), arguments | SETTINGS, weight.device)


def gather_blocks(weight: Tensor, rows: Tensor | None, cols: Tensor | None, blocks: Blocks) -> None:
    """As the reference."""
    height, width = weight.shape
    if not weight.numel():
        return
    source = _carried(weight)
    align = _align(source) if source.stride(1) == 1 and aligned(source) else 1
    arguments = {
        "weight": source, "row_places": _places(rows, height, weight.device),
        "col_places": _places(cols, width, weight.device), "height": height, "width": width // align,
        "kept_width": blocks.kept.shape[1], "per_row": source.stride(0) // align, "per_col": source.stride(1),
        "ALIGN": align,
    }  # fmt: skip
    arguments |= {name: _carried(block) for name, block in blocks._asdict().items()}
    launch(blocks_kernel, _grid(height, width), arguments | SETTINGS, weight.device)


def _places(kept: Tensor | None, size: int, device: torch.device) -> Tensor:
    """int32 [size], as `blocks_kernel` reads them; without waiting for the device."""
    if kept is None:
        return torch.arange(size, dtype=torch.int32, device=device)
    missing = torch.ones(size, dtype=torch.int32, device=device)
    missing[kept.long()] = 0
    places = missing.cumsum(0, dtype=torch.int32).neg_()
    places[kept.long()] = torch.arange(kept.numel(), dtype=torch.int32, device=device)
    return places


def _carried(tensor: Tensor) -> Tensor:
    return tensor.view(CARRIERS[tensor.element_size()])


def _align(tensor: Tensor) -> int:
    return VECTOR_BYTES // tensor.element_size()


def _grid(height: int, width: int) -> tuple[int, int]:
    return triton.cdiv(height, SETTINGS["BLOCK_R"]), triton.cdiv(width, SETTINGS["BLOCK_C"])
