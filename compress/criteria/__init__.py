"""How important a unit is: the published criteria, and the reduction of what was seen to one score per unit."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from slimvlm.compress.criteria.criterion import CRITERIA

if TYPE_CHECKING:
    from slimvlm.compress.statistics.loss import poorly_fitted_loss

__all__ = ["CRITERIA", "poorly_fitted_loss"]


def __getattr__(name: str) -> object:
    """The loss, imported when asked for: a command line that names the rows must not import torch."""
    if name in __all__:
        return getattr(import_module("slimvlm.compress.statistics.loss"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
