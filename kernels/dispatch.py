"""Which implementation of an operation runs on a device: Triton on a GPU, blocked torch everywhere else."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch
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
    path = "gpu" if present[0].is_cuda and fits and not why_not_triton(present[0].device) else "blocked"
    return importlib.import_module(f"slimvlm.kernels.{operation}.{path}")


@functools.cache
def why_not_triton(device: torch.device) -> str:
    """What keeps Triton from this CUDA (or ROCm) device, also said once as a warning; empty if nothing does.

    Triton builds a launcher with a C compiler and asks the driver to load its code: whether that works is known after a
    launch, so one is tried, and waited for.
    """
    reason, remedy = "triton is not installed", "`pip install 'slimvlm[triton]'` installs it"
    if importlib.util.find_spec("triton") is not None:
        try:
            norms = importlib.import_module("slimvlm.kernels.norms.gpu").row_norms(torch.ones(1, 16, device=device))
            right = norms.tolist() == [4.0]
            reason = "" if right else "triton's first launch gave a wrong result"
        except Exception as error:  # whatever keeps a launch from working, torch does the same
            text = str(error).strip() or type(error).__name__
            reason = f"triton's first launch failed ({text.splitlines()[0].rstrip('.')})"
        remedy = "it needs a C compiler (`gcc` or `clang`, or CC) and a driver for its version"
    if reason:
        warnings.warn(
            f"{reason}: scoring and slicing run on plain torch on this GPU, slower but with the same results; {remedy}",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason
