"""Units leave the weights: cut for good, or switched off to compare."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimvlm.compress.slicing.apply import apply_plan
    from slimvlm.compress.slicing.mask import mask_plan

__all__ = ["apply_plan", "mask_plan"]

FILES = {"apply_plan": "slimvlm.compress.slicing.apply", "mask_plan": "slimvlm.compress.slicing.mask"}


def __getattr__(name: str) -> Any:
    if name not in FILES:  # imported when asked for: a command line that names them must not import torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(FILES[name]), name)
