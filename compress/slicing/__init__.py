"""Units leave the weights: cut for good, or switched off to compare."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimvlm.compress.slicing.apply import apply_plan
    from slimvlm.compress.slicing.mask import mask_plan

__all__ = ["apply_plan", "mask_plan"]


def __getattr__(name: str) -> object:
    """Imported when asked for: a command line that names the rows of this folder must not import torch."""
    if name in __all__:
        return getattr(import_module(f"{__name__}.{name.removesuffix('_plan')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
