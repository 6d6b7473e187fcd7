"""Row norms in Triton: one program per row, or few; the matrix is read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimvlm.kernels.launching import VECTOR_BYTES, aligned, launch

LONG_ROWS = {"BLOCK_T": 1, "BLOCK_C": 2048, "num_warps": 4}
SHORT_ROWS = {"BLOCK_T": 2, "BLOCK_C": 1024, "num_warps": 4}  # of up to 1024: most of a longer block would idle


@triton.jit(do_not_specialize=["tokens", "width", "per_token"])
def norms_kernel(
    matrix, norms, tokens, width, per_token, per_channel, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows, over their whole length."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    squares = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    width, per_token = width * ALIGN, per_token * ALIGN
    for base in range(0, width, BLOCK_C):
        channel = base + tl.arange(0, BLOCK_C)
        inside = (token < tokens)[:, None] & (channel < width)[None, :]
        places = token[:, None] * per_token + channel[None, :].to(tl.int64) * per_channel
        value = tl.load(matrix + places, mask=inside, other=0).to(tl.float32)
        squares += value * value
    tl.store(norms + token, tl.sqrt(tl.sum(squares, 1)), mask=token < tokens)


def row_norms(matrix: Tensor) -> Tensor:
    """As the reference."""
    tokens, width = matrix.shape
    norms = torch.empty(tokens, device=matrix.device)
    if tokens:
        align = VECTOR_BYTES // matrix.element_size() if matrix.stride(1) == 1 and aligned(matrix) else 1
        arguments = {
            "matrix": matrix, "norms": norms, "tokens": tokens, "width": width // align,
            "per_token": matrix.stride(0) // align, "per_channel": matrix.stride(1), "ALIGN": align,
        }  # fmt: skip
        settings = SHORT_ROWS if width <= SHORT_ROWS["BLOCK_C"] else LONG_ROWS
        grid = (triton.cdiv(tokens, settings["BLOCK_T"]),)
        launch(norms_kernel, grid, arguments | settings, matrix.device)
    return norms
