"""One block that learns: its optimiser, its steps, its best state, and its file, from which it goes on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict  # Any: what blocks are called with

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimvlm.compress.files.decoding import decode
from slimvlm.compress.files.writing import load_tensors, save_tensors
from slimvlm.compress.models.streaming.lazy import Lazy
from slimvlm.compress.models.streaming.shards import Shard
from slimvlm.compress.options import TrainOptions
from slimvlm.compress.recovery.blockwise.lessons import Lesson, Taught, output_of
from slimvlm.compress.recovery.distillation.losses import lost_energy
from slimvlm.compress.recovery.training.state import WEIGHT, moments, restore, set_moments, whole
from slimvlm.compress.recovery.training.workers import adam, autocast

BEST = "best/"  # before the names of the best weights in a file; those it learns with come after WEIGHT
FILE = "block-{path}.safetensors"
FLOOR = 1e-30  # of an energy that divides


@dataclass
class Learnt:
    """What a block did so far.

    Attributes:
        block: its path in the student.
        steps: that were made, those included that were skipped because loss or gradient was not finite.
        before, after: share of the dense output's energy that it misses on the held-out samples: as it was cut, and in
            its best state, of step `best_step` (0: as it was cut). None before they were looked at.
        judged: the step of the last look.
    """

    block: str
    steps: int = 0
    before: float | None = None
    after: float | None = None
    best_step: int = 0
    skipped: int = 0
    judged: int = -1


class Facts(TypedDict):
    """In the header of a file."""

    learnt: Learnt
    training: str


class Pupil:
    """A block of the student with what it learns with. Only what asks for gradients is trained.

    Args:
        student: holds the block of the lesson; its low-rank layers, if it has any, are in place. Of one that is
            streamed the block is in memory from `begin` to `end`.
        folder: of its file, and of those of others.
        training: what must be the same for it to go on from its file.
        seed: of dropout.
    """

    def __init__(
        self, student: nn.Module, lesson: Lesson, options: TrainOptions, folder: Path, training: str, seed: int
    ) -> None:
        self.lesson, self.options, self.training, self.seed = lesson, options, training, seed
        self.block = student.get_submodule(lesson.path)
        self._names = [name for name, value in self.block.named_parameters() if value.requires_grad]
        self.device = next(value.device for value in student.parameters() if not value.is_meta)
        self.dtype = next(self.block.parameters()).dtype
        self.file = folder / FILE.format(path=lesson.path)
        self.learnt = Learnt(lesson.path)
        self._best: dict[str, Tensor] = {}
        self._lost = self._energy = 0.0
        self._adapters = [module for module in self.block.modules() if isinstance(module, BaseTunerLayer)]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What it trains, by its name in the student."""
        return {f"{self.lesson.path}.{name}": self.block.get_parameter(name) for name in self._names}

    def begin(self) -> None:
        """Make what it learns with, and go on from its file, if there is one of this training."""
        for value in self.trained.values():
            value.requires_grad_(True)
        self.optimizer = adam(self.trained, self.options.weight_decay, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.options.precision == "fp16")
        self._best = self._state()
        if (found := self._read()) is not None:
            tensors, self.learnt = found
            set_moments(self.optimizer, self.trained, tensors)
            restore(self.trained, tensors, self.file.parent, WEIGHT)
            self._best = {name: tensors[BEST + name] for name in self.trained}

    def finished(self) -> bool:
        """Whether an earlier process made all its steps; the block has the state that was kept, then."""
        found = self._read()
        if found is None or found[1].judged < self.options.steps:
            return False
        there = {name: value for name, value in self.trained.items() if not isinstance(value, Lazy)}
        restore(there, found[0], self.file.parent, BEST)
        self.settle()
        self.learnt = found[1]
        return True

    def settle(self) -> None:
        """Have a streamed student read what the block learnt from its file, once all steps are made."""
        lazy = {name: value for name, value in self.trained.items() if isinstance(value, Lazy)}
        stored = Shard(self.file).lazies() if lazy else {}
        for name, value in lazy.items():
            value.source = stored[BEST + name].source

    def learn(self, taught: Taught, rate: float) -> None:
        """The next step; one whose loss or gradient is not finite changes nothing."""
        step = self.learnt.steps
        torch.manual_seed(random.Random(f"{self.seed} {self.lesson.path} {step}").getrandbits(63))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self._in_training():
            lost, energy = self._compare(taught)
        self.scaler.scale(lost / energy.clamp(min=FLOOR)).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), self.options.clip or math.inf)
        if self.scaler.is_enabled() or norm.isfinite():
            self.scaler.step(self.optimizer)  # leaves itself out, where a scaled gradient is not finite
        self.learnt.skipped += not norm.isfinite()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.learnt.steps = step + 1

    @torch.no_grad()
    def look(self, taught: Taught) -> None:
        """Count what it misses of a held-out batch; `judge` ends the look."""
        lost, energy = self._compare(taught)
        self._lost += lost.item()
        self._energy += energy.item()

    def judge(self) -> None:
        """Keep the state it is in, if it is the best one so far."""
        missed = self._lost / max(self._energy, FLOOR)
        self._lost = self._energy = 0.0
        learnt = self.learnt
        learnt.judged = learnt.steps
        if learnt.before is None:
            learnt.before = learnt.after = missed
        elif missed < (math.inf if learnt.after is None or math.isnan(learnt.after) else learnt.after):
            learnt.after, learnt.best_step = missed, learnt.steps
            self._best = self._state()

    def save(self) -> None:
        """Write its file.

        Raises:
            OutputError: it cannot be written.
        """
        tensors = {BEST + name: value for name, value in self._best.items()}
        if self.learnt.judged < self.options.steps:
            tensors |= {WEIGHT + name: value for name, value in self._state().items()}
            tensors |= moments(self.optimizer, self.trained)
        save_tensors(self.file, tensors, {"facts": {"learnt": asdict(self.learnt), "training": self.training}})

    def end(self) -> None:
        """Write its file, put the best state into the block, and forget what it learnt with."""
        self.save()
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(self._best[name])
        self._best = {}
        del self.optimizer, self.scaler

    def _compare(self, taught: Taught) -> tuple[Tensor, Tensor]:
        """(missed, whole) energy of the output."""
        args, kwargs = tree_map(self._placed, (taught.args, dict(taught.kwargs)))
        with autocast(self.device, self.options.precision):
            output = output_of(self.block(*args, **kwargs))
        mask = None if taught.mask is None else taught.mask.to(self.device)
        return lost_energy(output, taught.output.to(self.device), mask)

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    @contextmanager
    def _in_training(self) -> Iterator[None]:
        """Dropout of low-rank layers alone is on, as in any training."""
        for module in self._adapters:
            module.train()
        try:
            yield
        finally:
            for module in self._adapters:
                module.eval()

    def _state(self) -> dict[str, Tensor]:
        return {name: whole(value).clone() for name, value in self.trained.items()}

    def _read(self) -> tuple[dict[str, Tensor], Learnt] | None:
        """What its file holds; None where there is none, or that of another training: it is learnt again, then."""
        try:
            tensors, told = load_tensors(self.file)
            facts = decode(told.get("facts"), Facts)
        except ValueError:
            return None
        kinds = (BEST,) if facts["learnt"].judged >= self.options.steps else (BEST, WEIGHT)
        fits = all(
            kind + name in tensors and tensors[kind + name].shape == value.shape
            for kind in kinds
            for name, value in self.trained.items()
        )
        return (tensors, facts["learnt"]) if fits and facts["training"] == self.training else None


def bytes_of(student: nn.Module, lessons: Sequence[Lesson]) -> Mapping[str, int]:
    """By path what learning a block takes: gradients, two moments and the best state of all that is trained."""
    return {
        lesson.path: sum(
            4 * value.nbytes for value in student.get_submodule(lesson.path).parameters() if value.requires_grad
        )
        for lesson in lessons
    }
