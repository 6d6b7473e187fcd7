"""Row norms in Triton: one program per row, or few; the matrix is read once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimvlm.kernels.launching import VECTOR_BYTES, aligned, launch

CONFIGS = [
    triton.Config({"BLOCK_T": 1, "BLOCK_C": 2048}, num_warps=4),
    triton.Config({"BLOCK_T": 4, "BLOCK_C": 1024}, num_warps=4),
]


@triton.autotune(configs=CONFIGS, key=["width", "ALIGN"], cache_results=True)
@triton.jit
def norms_kernel(
    matrix, norms, tokens, width, per_token, per_channel, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows, over their whole length."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    squares = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    if ALIGN > 1:
        width, per_token = tl.multiple_of(width, ALIGN), tl.multiple_of(per_token, ALIGN)
    for base in range(0, width, BLOCK_C):
        channel = base + tl.arange(0, BLOCK_C)
        inside = (token < tokens)[:, None] & (channel < width)[None, :]
        places = token[:, None] * per_token + channel[None, :].to(tl.int64) * per_channel
        value = tl.load(matrix + places, mask=inside, other=0).to(tl.float32)
        squares += value * value
    tl.store(norms + token, tl.sqrt(tl.sum(squares, 1)), mask=token < tokens)


def row_norms(matrix: Tensor, config: Any = None) -> Tensor:
    """As the reference. `config` as in `launch`."""
    tokens, width = matrix.shape
    norms = torch.empty(tokens, device=matrix.device)
    if tokens:
        whole = matrix.stride(1) == 1 and aligned(matrix)
        arguments = {
            "matrix": matrix, "norms": norms, "tokens": tokens, "width": width, "per_token": matrix.stride(0),
            "per_channel": matrix.stride(1), "ALIGN": VECTOR_BYTES // matrix.element_size() if whole else 1,
        }  # fmt: skip
        launch(norms_kernel, lambda meta: (triton.cdiv(tokens, meta["BLOCK_T"]),), arguments, matrix.device, config)
    return norms
