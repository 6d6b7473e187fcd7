"""Which units go: scores and costs in, one flag per unit out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimvlm.compress.allocate.allocators import ALLOCATORS
    from slimvlm.compress.allocate.balanced import allocate_balanced, allocate_global
    from slimvlm.compress.allocate.local import allocate_local

__all__ = ["ALLOCATORS", "allocate_balanced", "allocate_global", "allocate_local"]

FILES = {
    "ALLOCATORS": "slimvlm.compress.allocate.allocators",
    "allocate_balanced": "slimvlm.compress.allocate.balanced",
    "allocate_global": "slimvlm.compress.allocate.balanced",
    "allocate_local": "slimvlm.compress.allocate.local",
}


def __getattr__(name: str) -> Any:
    if name not in FILES:  # imported when asked for: a command line that names them must not import torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(FILES[name]), name)
