"""Which implementation of an operation runs on a device: Triton on a GPU, blocked torch everywhere else."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

from torch import Tensor


def choose(operation: str, *operands: Tensor | None, dtypes: tuple[object, ...] = ()) -> ModuleType:
    """The module `<operation>.gpu` or `<operation>.blocked` that serves these operands (on one device).

    Args:
        operation: name of a folder of this package.
        operands: None is skipped.
        dtypes: what the Triton kernel takes; empty for all.
    """
    present = [operand for operand in operands if operand is not None]
    fits = not dtypes or all(operand.dtype in dtypes for operand in present)
    path = "gpu" if present[0].is_cuda and fits and _has_triton() else "blocked"
    return importlib.import_module(f"slimvlm.kernels.{operation}.{path}")


@functools.cache
def _has_triton() -> bool:
    """Asked only on a CUDA (or ROCm) device; says once what is missing there."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn(
            "triton is not installed: scoring and slicing run on plain torch on this GPU, slower but with the same "
            "results; `pip install 'slimvlm[triton]'` installs it",
            RuntimeWarning,
            stacklevel=2,
        )
    return found
