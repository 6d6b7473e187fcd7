"""How long, how fast and on what a training learns: its options checked, stage and learning rate of every step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.options import PRECISIONS, SCHEDULES, TrainOptions
from slimvlm.compress.recovery.distillation.recipe import Stage, stage_bounds

POSITIVE = ("steps", "train_batch_size", "accumulate", "learning_rate", "checkpoint_every", "validate_every")


def check_training(options: TrainOptions) -> None:
    """Refuse options that no training can have.

    Raises:
        UnsuitableOptionError: an unknown schedule or precision, or a number that must be positive and is not.
    """
    for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
        if getattr(options, name) not in known:
            raise UnsuitableOptionError(f"{name} {getattr(options, name)!r} is unknown; use {', '.join(known)}")
    for name in POSITIVE:
        if not (math.isfinite(getattr(options, name)) and getattr(options, name) > 0):
            raise UnsuitableOptionError(f"{name} must be a positive number, not {getattr(options, name)}")
    for name in ("warmup", "weight_decay", "clip"):
        if not (math.isfinite(getattr(options, name)) and getattr(options, name) >= 0):
            raise UnsuitableOptionError(f"{name} must be 0 or more, not {getattr(options, name)}")
    if options.patience is not None and options.patience < 1:
        raise UnsuitableOptionError(f"patience must be at least one validation, not {options.patience}")


class Schedule:
    """The stage and the learning rate of every step, counted from 0.

    Raises:
        ValueError: there is no stage.
    """

    def __init__(self, stages: Sequence[Stage], options: TrainOptions) -> None:
        self.stages, self.options = tuple(stages), options
        self.bounds = stage_bounds(self.stages, options.steps)

    def index(self, step: int) -> int:
        """Number of the step's stage."""
        return bisect_right(self.bounds, step)

    def starts_stage(self, step: int) -> bool:
        """Whether the step is the first of its stage."""
        return step == 0 or self.index(step) != self.index(step - 1)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant, or a half cosine that would reach 0 one step after the last."""
        options = self.options
        first, last = 0, options.steps
        if options.reset_optimizer:
            stage = self.index(step)
            first, last = (self.bounds[stage - 1] if stage else 0), self.bounds[stage]
        done, total = step - first, last - first
        warmup = min(options.warmup, total)
        if done < warmup:
            return options.learning_rate * (done + 1) / warmup
        if options.schedule == "constant":
            return options.learning_rate
        return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))
