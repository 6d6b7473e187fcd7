"""Which units go, and in which order: scores and costs in, unit numbers out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimvlm.compress.allocate.allocators import ALLOCATORS

if TYPE_CHECKING:
    from collections.abc import Callable

    from slimvlm.compress.allocate.pool import Flags, Pool

    allocate_balanced: Callable[[Pool, float], Flags]
    allocate_global: Callable[[Pool, float], Flags]
    allocate_local: Callable[[Pool, float], Flags]
    allocate_paper: Callable[[Pool, float], Flags]

__all__ = ["ALLOCATORS", "allocate_balanced", "allocate_global", "allocate_local", "allocate_paper"]


def __getattr__(name: str) -> Any:
    """`allocate_NAME(pool, target)`: what the row NAME takes, True for the units that go."""
    prefix, _, row = name.partition("_")
    if prefix == "allocate" and row in ALLOCATORS:
        return ALLOCATORS[row].flags
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
