"""What every Triton kernel of this package is launched with: a tuned configuration, on the operands' device.

Imported by `gpu.py` modules only, so that triton is imported when a GPU (or Triton's interpreter) is used, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

VECTOR_BYTES = 16  # of one load or store of a thread
INTERPRETED = triton.knobs.runtime.interpret  # kernels run as Python on host tensors: the tests' way without a GPU


def launch(
    tuner: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    arguments: Mapping[str, Any],
    device: torch.device,
    config: Any = None,
) -> None:
    """Run a kernel decorated by `triton.autotune`.

    Args:
        tuner: the kernel.
        grid: number of programs, from the configuration's constants.
        arguments: of the kernel, by name.
        device: where the operands are.
        config: one of `tuner.configs`; None measures all on the first call of a kind and keeps the fastest. The
            interpreter takes the first, it has nothing to measure.
    """
    if config is None and INTERPRETED:
        config = tuner.configs[0]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if config is None:
            tuner[grid](**arguments)
        else:
            tuner.fn[grid](**arguments, **config.all_kwargs())


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
