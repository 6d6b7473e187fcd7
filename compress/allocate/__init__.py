"""Which units go: scores and costs in, one flag per unit out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slimvlm.compress.allocate.allocators import ALLOCATORS

if TYPE_CHECKING:
    from slimvlm.compress.allocate.balanced import allocate_balanced, allocate_global
    from slimvlm.compress.allocate.local import allocate_local
    from slimvlm.compress.allocate.paper import allocate_paper

__all__ = ["ALLOCATORS", "allocate_balanced", "allocate_global", "allocate_local", "allocate_paper"]


def __getattr__(name: str) -> Any:
    """The function of a row, imported when asked for: a command line that names the rows must not import torch."""
    for row in ALLOCATORS.values():
        if name == row.place[1]:
            return getattr(import_module(f"{__name__}.{row.place[0]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
