"""The three operations on whole weight matrices that scoring and cutting spend their time in.

Each lives in its own folder: `reference.py` is the plain formula, `cpu.py` the blocked product path, `__init__.py`
checks the arguments and picks the path by device. This module imports nothing until a name is asked for (PEP 562):
transformers probes a top-level package of this name, and `slimvlm --help` must stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimvlm.kernels.gather import gather_2d
    from slimvlm.kernels.histogram import angle_histogram, histogram_entropy
    from slimvlm.kernels.taylor import squared_sums, taylor_sums

__all__ = ["angle_histogram", "gather_2d", "histogram_entropy", "squared_sums", "taylor_sums"]

FOLDERS = {
    "angle_histogram": "histogram",
    "gather_2d": "gather",
    "histogram_entropy": "histogram",
    "squared_sums": "taylor",
    "taylor_sums": "taylor",
}


def __getattr__(name: str) -> Any:
    if name not in FOLDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{FOLDERS[name]}"), name)
