"""Options of a training with nothing left to choose."""

from __future__ import annotations

from typing import Any

from slimvlm.compress.options import TrainOptions


def train_options(**given: Any) -> TrainOptions:
    """One rate throughout, fp32, validations far apart; and what is given."""
    plain = {"learning_rate": 1e-4, "schedule": "constant", "warmup": 0, "clip": 1.0, "reset_optimizer": False}
    return TrainOptions(**{**plain, "precision": "no", "validate_every": 500, **given})
