"""How long, how fast and on what a training learns: its options, the stage and the learning rate of every step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.options import PRECISIONS, SCHEDULES
from slimvlm.compress.recovery.distillation.recipe import Stage, stage_bounds

POSITIVE = ("steps", "batch_size", "accumulate", "lr", "checkpoint_every", "validate_every")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a student is trained.

    Attributes:
        steps: optimiser steps, over all stages.
        batch_size: samples of one optimiser step, over all processes and accumulated parts.
        accumulate: parts a process makes of its share, one forward and backward each: less memory, same result but for
            feature losses, which are one cosine per part.
        lr: learning rate after the warm-up.
        schedule: `constant`, or `cosine` down to 0.
        warmup: steps of linear growth of the learning rate.
        weight_decay: of AdamW; vectors (biases, norms) do not decay.
        clip: largest norm of the gradient; 0 for no bound.
        mixed_precision: dtype of the forward: `no` (that of the weights), `bf16` or `fp16`.
        checkpoint_every: steps between two checkpoints, from which a killed training goes on.
        validate_every: steps between two validations.
        patience: stop after so many validations of the last stage without improvement; None: never.
        gradient_checkpointing: compute activations again in the backward pass: less memory, more time, same result.
        seed: of the order of the data and of dropout.
        reset_optimizer: every stage starts with a fresh AdamW and a warm-up (UKMP); schedules then span a stage.

    Raises:
        UnsuitableOptionError: an unknown schedule or precision, or a number that must be positive and is not.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    lr: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    mixed_precision: str = "no"
    checkpoint_every: int = 500
    validate_every: int = 500
    patience: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("mixed_precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise UnsuitableOptionError(f"{name} {getattr(self, name)!r} is unknown; use {', '.join(known)}")
        for name in POSITIVE:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UnsuitableOptionError(f"{name} must be a positive number, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UnsuitableOptionError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise UnsuitableOptionError(f"patience must be at least one validation, not {self.patience}")


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
            return options.lr * (done + 1) / warmup
        if options.schedule == "constant":
            return options.lr
        return options.lr * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))
