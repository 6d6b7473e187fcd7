"""The training of a student: the loop, its checkpoints, and the best weights at the end.

Every step seeds the random generators from (seed, step, process), and the order of the data follows from the seed and
the step too: a training that was killed and goes on from its checkpoint reaches the weights it would have reached.
Several processes share the samples of a step, and follow the loss of one: their losses are parts of the step's (see
`distillation/share.py`).
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimvlm.compress.errors import OutputError, RecoveryError, UnsuitableOptionError
from slimvlm.compress.options import TrainOptions
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.training.choice import Validation
from slimvlm.compress.recovery.training.history import History, Journal, peak_memory
from slimvlm.compress.recovery.training.schedule import Schedule, check_training
from slimvlm.compress.recovery.training.state import WEIGHT, StateFolder, make_moments, moments
from slimvlm.compress.recovery.training.stepping import Stepper, Task
from slimvlm.compress.recovery.training.workers import Workers, own_accelerate

MOST_SKIPPED = 10  # steps in a row whose loss is not finite
TERMINATED = 128 + signal.SIGTERM  # exit code


def train(
    distiller: Distiller, task: Task, options: TrainOptions, folder: Path, progress: Progress = silent
) -> History:
    """Train `distiller.student` in place; afterwards it has its best weights (see `choice`), be they the starting ones.

    Runs in one process or several (`torchrun`, `accelerate launch`; FSDP 2 by accelerate's configuration). With sharded
    weights the student stays sharded: `state.load_best` puts the result into a whole one. The distiller is left in
    training mode, without wrappers and gradients; the random generators are as before.

    Args:
        distiller: `forward(batch, stage, targets)` gives the loss and its parts; the parameters of its `student` that
            ask for gradients are trained.
        folder: where the checkpoint, from which a training goes on, the best weights and `recovery.jsonl` are kept.
        progress: called after every step by the first process, with ("recover", step, steps, stage, loss and speed).

    Raises:
        RecoveryError: the loss was not finite ten times in a row (the last checkpoint stays), or the checkpoint is
            damaged or another training's.
        UnsuitableOptionError: nothing to train, no sample, or a batch too small for the processes and parts.
        OutputError: the folder cannot be written, or the disk is full; the last checkpoint stays.
        SystemExit: after SIGTERM, with exit code 143 and everything saved.
    """
    check_training(options)
    cuda = [parameter.device for parameter in distiller.parameters() if parameter.is_cuda][:1]
    with own_accelerate(), torch.random.fork_rng(cuda), _checkpointed_activations(distiller, options):
        workers = Workers(distiller, options.precision, options.weight_decay)
        try:
            files = StateFolder(folder, writer=workers.rank == 0)
            with sigterms() as signals:
                return _Training(task, options, workers, files, progress).go(signals)
        finally:
            workers.close()


class _Training:
    """One training in this process."""

    def __init__(
        self, task: Task, options: TrainOptions, workers: Workers, files: StateFolder, progress: Progress
    ) -> None:
        self.task, self.options, self.workers, self.files, self.progress = task, options, workers, files, progress
        self.schedule = Schedule(task.stages, options)
        self.stepper = Stepper(task, self.schedule, options, workers)
        self.facts = History()
        self.journal: Journal

    def go(self, signals: list[int]) -> History:
        """Train from the start or the checkpoint to the end."""
        self._start()
        self.began = time.perf_counter() - self.facts.seconds
        try:
            self.workers.model.train()
            self._validate_if_due()
            if self.facts.steps == 0:
                self._checkpoint()
            self.facts.stopped_early = self._steps(signals)
            if self.task.validate is None:
                self.facts.best_step = self.facts.steps
                with self._together():
                    self.facts.best_file = self.files.save_best(self._weights(), self.facts.steps)
            self._checkpoint()
            if self.workers.sum(torch.tensor(float(len(signals)), device=self.workers.device)) > 0:
                raise SystemExit(TERMINATED)
            if self.facts.best_step != self.facts.steps:
                self.files.fill(self.facts.best_file, self._weights())
        finally:
            self.journal.close()
        self.facts.seconds = time.perf_counter() - self.began
        self.facts.peak_memory_bytes = peak_memory(self.workers.device)
        return self.facts

    def _steps(self, signals: list[int]) -> bool:
        """All steps that are left; whether they ended early."""
        options, facts = self.options, self.facts
        while facts.steps < options.steps:
            if options.patience is not None and facts.stale >= options.patience:
                return True
            if self._step(bool(signals)):
                self._checkpoint()  # at once: who terminates kills soon; the validation is made up for
                raise SystemExit(TERMINATED)
            self._validate_if_due()
            if facts.steps % options.checkpoint_every == 0:
                self._checkpoint()
            self._report()
        return False

    def _step(self, told_to_stop: bool) -> bool:
        """The next step and its line; whether any process was told to stop."""
        facts, began = self.facts, time.perf_counter()
        stage = self.schedule.stages[self.schedule.index(facts.steps)]
        outcome = self.stepper(facts.steps, told_to_stop)
        seconds = time.perf_counter() - began
        if not (outcome.finite or outcome.overflowed):
            self._checkpoint()  # the last good state: skipped steps change nothing
        facts.add_step(stage.name, outcome.loss if outcome.finite else None, outcome.tokens, seconds)
        line = {"step": facts.steps, "stage": stage.name, "lr": outcome.rate}
        timing = {"tokens_per_second": round(outcome.tokens / seconds, 1), "seconds": round(seconds, 6)}
        if outcome.finite:
            facts.streak = 0
            found = {"loss": outcome.loss, "parts": outcome.parts, "grad_norm": outcome.norm}
        else:
            facts.skipped += 1
            facts.streak += not outcome.overflowed
            found = {"loss": None, "skipped": True}
        self.journal.write(line | found | timing)
        if facts.streak == MOST_SKIPPED:
            raise RecoveryError(
                f"the loss or its gradient was not finite in {MOST_SKIPPED} steps in a row, up to step {facts.steps} "
                f"(stage {stage.name}); the last good state is kept in {self.files.path}. Train with a lower learning "
                "rate, a longer warm-up, or without mixed precision"
            )
        return outcome.told_to_stop

    def _validate_if_due(self) -> None:
        """Score the student, unless it was done before an interruption; keep its weights unless they are worse."""
        facts, validate = self.facts, self.task.validate
        due = facts.steps % self.options.validate_every == 0 or facts.steps == self.options.steps
        if validate is None or not due or facts.validated >= facts.steps:
            return
        began = time.perf_counter()
        with self.workers.usable_student():
            told = self.workers.first_says([*chain(*validate())])
        found = Validation((told[0], told[1]), (told[2], told[3])) if all(map(math.isfinite, told)) else None
        last_stage = facts.steps > 0 and self.schedule.index(facts.steps - 1) == len(self.task.stages) - 1
        keep = facts.add_validation(found, last_stage)
        if keep:
            with self._together():
                facts.best_file = self.files.save_best(self._weights(), facts.steps)
        seconds = round(time.perf_counter() - began, 6)
        facts.validation_seconds += seconds
        line = {"step": facts.steps, "validation": facts.last or (None, None), "best": keep, "seconds": seconds}
        self.journal.write(line)

    def _checkpoint(self) -> None:
        """Save everything, unless the last steps were skipped: what is on disk then is the last good state."""
        if self.facts.streak > 0:
            return
        self.facts.seconds = time.perf_counter() - self.began
        self.facts.journal_bytes = self.journal.bytes_written()
        scaler = self.workers.accelerator.scaler
        facts = {
            "facts": asdict(self.facts),
            "training": self._fingerprint(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        tensors = {WEIGHT + name: value for name, value in self._weights().items()}
        tensors |= moments(self.workers.optimizer, self.workers.trained)
        with self._together():
            self.files.save(tensors, facts, self.facts.steps, self.facts.best_file)

    def _start(self) -> None:
        """From the checkpoint, if there is one."""
        saved = self.files.load()
        if saved is None:
            self.files.clear()
        else:
            self._require_same_training(saved["training"])
            tensors = {WEIGHT + name: value for name, value in self._weights().items()}
            known = self.files.shapes(saved["tensors"])
            tensors |= make_moments(self.workers.optimizer, self.workers.trained, known)
            self.files.fill(saved["tensors"], tensors)
            if saved["scaler"] is not None and self.workers.accelerator.scaler is not None:
                self.workers.accelerator.scaler.load_state_dict(saved["scaler"])
            self.facts = saved["facts"]
        if self.workers.first_says([self.facts.steps, saved is not None]) != (self.facts.steps, saved is not None):
            raise RecoveryError(
                f"process {self.workers.rank} finds another training in {self.files.path} than the first process; all "
                "need the same folder, on a disk they share"
            )
        self.journal = Journal(self.files.path, self.facts.journal_bytes, self.files.writer)

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.workers.trained.items()}

    def _fingerprint(self) -> dict[str, Any]:
        """What must be the same for a training to go on, as JSON (Any); how often it is saved may change."""
        names = {one.name for one in fields(TrainOptions)} - {"checkpoint_every"}
        facts = {
            "options": {name: getattr(self.options, name) for name in sorted(names)},
            "seed": self.task.seed,
            "samples": self.task.count,
            "stages": [asdict(stage) for stage in self.task.stages],
            "weights": {name: list(value.shape) for name, value in self.workers.trained.items()},
        }
        as_saved: dict[str, Any] = json.loads(json.dumps(facts))
        return as_saved

    def _require_same_training(self, earlier: Mapping[str, Any]) -> None:
        now = self._fingerprint()
        for part, value in now.items():
            if earlier.get(part) != value:
                changed = [
                    f"{name} = {earlier[part].get(name)!r}, not {new!r}"
                    for name, new in (value.items() if isinstance(value, dict) else ())
                    if earlier[part].get(name) != new
                ]
                raise RecoveryError(
                    f"{self.files.path} holds a training with other {part}"
                    f"{': ' + '; '.join(changed[:3]) if changed else ''}; go on with the same, or in another folder"
                )

    @contextmanager
    def _together(self) -> Iterator[None]:
        """If the first process cannot write, all stop: the others would wait for it for ever."""
        failed: OutputError | None = None
        try:
            yield
        except OutputError as error:
            failed = error
        if self.workers.first_says([failed is not None]) == (1.0,):
            raise failed or OutputError(f"the first process cannot write {self.files.path}; see its message")

    def _report(self) -> None:
        if self.workers.rank != 0:
            return
        stage = self.facts.stages[-1]
        loss = "skipped" if stage["last_loss"] is None else f"loss {stage['last_loss']:.4g}"
        speed = stage["tokens"] / stage["seconds"] if stage["seconds"] else 0.0
        note = f"{stage['name']}: {loss}, {speed:.0f} tokens/s"
        self.progress("recover", self.facts.steps, self.options.steps, note)


@contextmanager
def sigterms() -> Iterator[list[int]]:
    """Those received inside, instead of dying of one; in a thread that is not the main one it cannot."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextmanager
def _checkpointed_activations(distiller: Distiller, options: TrainOptions) -> Iterator[None]:
    student = distiller.student
    if not options.gradient_checkpointing:
        yield
        return
    if not getattr(student, "supports_gradient_checkpointing", False):
        raise UnsuitableOptionError(
            f"{type(student).__name__} does not support gradient checkpointing; train without it, with smaller batches "
            "or more accumulation"
        )
    # transformers renames them on its way to version 6.
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    disable = getattr(student, "activation_checkpointing_disable", None) or student.gradient_checkpointing_disable
    enable({"use_reentrant": False})
    student.disable_input_require_grads()  # only reentrant checkpointing needs gradients of the embeddings
    try:
        yield
    finally:
        disable()
