"""What every Triton kernel of this package is launched with: the operands' device, and no tuning.

Nothing is measured before a launch. Every kernel moves its operands once and has one setting (two for the norms): small
programs of four warps, of which a processor holds many, with a few vectors of 16 bytes per thread under way. Tuning by
the exact width would measure anew for every width that a cut leaves. For the same reason sizes and strides are not
specialised: what the compiler must know of them is ALIGN, elements of a vector, by which they are divided on the host
and multiplied in the kernel (it believes a product with a constant; 1 where memory is not aligned).

Imported by `gpu.py` modules only, so that triton is imported when a GPU (or Triton's interpreter) is used, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

VECTOR_BYTES = 16  # of one load or store of a thread


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, object], device: torch.device) -> None:
    """Run a kernel.

    Args:
        kernel: decorated by `triton.jit`, which states no types.
        grid: number of programs.
        arguments: of the kernel, by name, and `num_warps`.
        device: where the operands are.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all these matrices consist of whole, aligned vectors, so that a thread may move 16 bytes at once."""
    for tensor in tensors:
        if tensor is None:
            continue
        step = VECTOR_BYTES // tensor.element_size()
        if tensor.stride().count(1) != 1:
            return False
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 1]
        jumps = [stride for stride in tensor.stride() if stride != 1]
        if tensor.data_ptr() % VECTOR_BYTES or any(number % step for number in sizes + jumps):
            return False
    return True
