"""How important a unit is: the published criteria, and the reduction of what was seen to one score per unit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimvlm.compress.criteria.criterion import CRITERIA, Criterion
    from slimvlm.compress.criteria.scores import Scores
    from slimvlm.compress.criteria.scoring import score_groups
    from slimvlm.compress.statistics.loss import poorly_fitted_loss

__all__ = ["CRITERIA", "Criterion", "Scores", "poorly_fitted_loss", "score_groups"]

FILES = {
    "CRITERIA": "slimvlm.compress.criteria.criterion",
    "Criterion": "slimvlm.compress.criteria.criterion",
    "Scores": "slimvlm.compress.criteria.scores",
    "poorly_fitted_loss": "slimvlm.compress.statistics.loss",
    "score_groups": "slimvlm.compress.criteria.scoring",
}


def __getattr__(name: str) -> Any:
    if name not in FILES:  # imported when asked for: a command line that names them must not import torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(FILES[name]), name)
