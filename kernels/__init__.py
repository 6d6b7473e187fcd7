"""The operations on whole weight matrices that scoring and cutting spend their time in.

Each lives in its own folder: `reference.py` is the plain formula, `blocked.py` the torch path that a CPU runs, `gpu.py`
the Triton kernel, `__init__.py` checks the arguments and picks the path by device. This module imports nothing until a
name is asked for (PEP 562): transformers probes a top-level package of this name, and `slimvlm --help` must stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimvlm.kernels.gather import Blocks, gather_2d, gather_blocks
    from slimvlm.kernels.histogram import angle_histogram, histogram_entropy
    from slimvlm.kernels.norms import row_norms
    from slimvlm.kernels.taylor import squared_sums, taylor_sums, taylor_sums_batch

__all__ = [
    "Blocks",
    "angle_histogram",
    "gather_2d",
    "gather_blocks",
    "histogram_entropy",
    "row_norms",
    "squared_sums",
    "taylor_sums",
    "taylor_sums_batch",
]

FOLDERS = {
    "taylor_sums": "taylor",
    "taylor_sums_batch": "taylor",
    "squared_sums": "taylor",
    "row_norms": "norms",
    "angle_histogram": "histogram",
    "histogram_entropy": "histogram",
    "gather_2d": "gather",
    "gather_blocks": "gather",
    "Blocks": "gather",
}


def __getattr__(name: str) -> Any:
    if name not in FOLDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{FOLDERS[name]}"), name)
