"""One optimiser step: this process's part of the batch, the gradients of all processes, and whether they are usable."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimvlm.compress.data.collate import Batch
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.options import TrainOptions
from slimvlm.compress.recovery.distillation.recipe import Stage
from slimvlm.compress.recovery.distillation.share import Share
from slimvlm.compress.recovery.distillation.teacher_cache import TeacherCache, batch_key
from slimvlm.compress.recovery.training.choice import Validation
from slimvlm.compress.recovery.training.order import batch_indices, divide
from slimvlm.compress.recovery.training.schedule import Schedule
from slimvlm.compress.recovery.training.workers import Workers


@dataclass(frozen=True)
class Task:
    """What a student is to learn, and from what.

    Attributes:
        stages: sets of losses, in order.
        collate: a padded training batch, on the CPU, of samples by number; every process asks for its part of a step.
        count: samples there are.
        seed: of the order of the data and of dropout.
        validate: what held-out samples say of the student; called by all processes, with the student in evaluation
            mode, before the first step, every `validate_every` steps and after the last. Without it the student keeps
            its last weights.
        cache: where the teacher's outputs are kept between epochs, in a folder of this teacher, these samples and this
            collation alone; not used with sharded weights.
    """

    stages: tuple[Stage, ...]
    collate: Callable[[list[int]], Batch]
    count: int
    seed: int = 0
    validate: Callable[[], Validation] | None = None
    cache: TeacherCache | None = None


@dataclass(frozen=True)
class StepOutcome:
    """What a step gave, the same in all processes.

    Attributes:
        loss, parts: over the whole batch.
        norm: of the gradient before it was bounded.
        finite: whether the weights were changed: loss and gradient were finite.
        overflowed: only the scaled gradients of fp16 were not, which is how their scale is found.
        told_to_stop: whether any process was.
    """

    loss: float
    parts: dict[str, float]
    norm: float
    tokens: int
    rate: float
    finite: bool
    overflowed: bool
    told_to_stop: bool


class Stepper:
    """Makes the steps of a training, in any order: a step depends on its number, not on those before it.

    Raises:
        UnsuitableOptionError: no sample, or a batch too small for the processes and accumulated parts.
    """

    def __init__(self, task: Task, schedule: Schedule, options: TrainOptions, workers: Workers) -> None:
        self.task, self.schedule, self.options, self.workers = task, schedule, options, workers
        size, parts = min(options.train_batch_size, task.count), workers.count * options.accumulate
        if task.count < 1:
            raise UnsuitableOptionError("there is no sample to train on; take a larger part of the data")
        if size < parts:
            raise UnsuitableOptionError(
                f"a batch of {size} samples cannot be divided over {workers.count} processes x {options.accumulate} "
                f"accumulated parts; take batches of at least {parts} samples"
            )

    def __call__(self, step: int, told_to_stop: bool) -> StepOutcome:
        """Step number `step` (from 0); the weights stay as they are if its loss or gradient is not finite."""
        workers, stage = self.workers, self.schedule.stages[self.schedule.index(step)]
        if self.options.reset_optimizer and self.schedule.starts_stage(step):
            workers.optimizer.state.clear()
        rate = self.schedule.learning_rate(step)
        for group in workers.optimizer.param_groups:
            group["lr"] = rate
        workers.seed(random.Random(f"{self.task.seed} {step} {workers.rank}").getrandbits(63))
        losses, tokens = self._learn(step, stage)
        norm = workers.clip(self.options.clip)
        told = torch.tensor([tokens, told_to_stop], dtype=torch.float32).to(workers.device, non_blocking=True)
        summed = workers.sum(torch.cat([torch.stack(list(losses.values())), told]))
        # The only wait for the device in a step, but for those in the code of a model.
        *values, counted, stopping, norm_value = torch.cat([summed, norm.reshape(1).to(summed)]).tolist()
        named = dict(zip(losses, values, strict=True))
        loss = named.pop("")
        finite = math.isfinite(loss) and math.isfinite(norm_value)
        scale = workers.scale()
        if finite or scale is not None:  # a scaled step leaves itself out, and lowers the scale
            workers.step()
        else:
            workers.forget()
        overflowed = not finite and scale is not None and scale > 1 and math.isfinite(loss)
        return StepOutcome(loss, named, norm_value, int(counted), rate, finite, overflowed, stopping > 0)

    def _learn(self, step: int, stage: Stage) -> tuple[dict[str, Tensor], int]:
        """Gradients of this process's samples; their part of the loss (keyed "") and of the loss's parts; their tokens.

        A part counts by its share of what the loss is a mean over, so all batches are made before the first is used.
        """
        workers = self.workers
        indices = batch_indices(self.task.count, self.options.train_batch_size, self.task.seed, step)
        parts = [divide(part, workers.count) for part in divide(indices, self.options.accumulate)]
        batches = [self.task.collate(part[workers.rank]) for part in parts]
        total: dict[str, Tensor] = {}
        for number, (batch, share) in enumerate(zip(batches, self._shares(batches, parts), strict=True)):
            placed = workers.place(batch)
            targets = self._targets(parts[number][workers.rank], placed, stage)
            with workers.accumulating(last=number == len(batches) - 1):
                loss, found = workers.model(placed, stage, targets, share)
                workers.backward(loss)
            for name, value in {"": loss.detach(), **found}.items():
                total[name] = total[name] + value.float() if name in total else value.float()
        return total, sum(tokens_of(batch) for batch in batches)

    def _shares(self, batches: Sequence[Batch], parts: Sequence[Sequence[Sequence[int]]]) -> list[Share]:
        """Of each of this process's batches; of each part of the step, `parts` has the samples of every process."""
        workers = self.workers
        counts = [workers.distiller.counts(batch) for batch in batches]
        own = torch.tensor([[*count.values()] for count in counts], dtype=torch.float32)
        if workers.count > 1:
            own = own.to(workers.device, non_blocking=True)
        weights = own / workers.sum(own.sum(0)).clamp(min=1)
        sizes = [[len(samples) for samples in part] for part in parts]
        everything = sum(map(sum, sizes))
        return [
            Share(
                weights=dict(zip(count, row.unbind(), strict=True)),
                even=sum(size) / everything / workers.count,
                first=sum(size[: workers.rank]),
                samples=sum(size),
                processes=workers.count,
                sum=workers.sum,
            )
            for count, row, size in zip(counts, weights, sizes, strict=True)
        ]

    def _targets(self, indices: Sequence[int], batch: Batch, stage: Stage) -> Mapping[str, Tensor] | None:
        """The teacher's outputs from the cache, put there if they were missing; None: the distiller is to ask it."""
        cache, workers = self.task.cache, self.workers
        if cache is None or workers.sharded or (workers.count > 1 and workers.distiller.family.contrastive):
            return None  # a dual encoder's teacher compares the samples of all processes, which then must all ask it

        def compute() -> dict[str, Tensor]:
            with workers.accelerator.autocast():
                found: dict[str, Tensor] = workers.distiller.targets(batch, stage)
                return found

        key = batch_key(*map(str, indices))
        return cache.outputs(key, workers.distiller.target_names(stage), compute)


def tokens_of(batch: Batch) -> int:
    """Its input tokens without padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
