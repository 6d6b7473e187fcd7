"""What a student learns: each block by itself, and the model as a whole; one after the other, or one of both."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from transformers import PreTrainedModel

from slimvlm.compress import processes
from slimvlm.compress.data.collate import Batch, Collator, collator_of
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.data.splits import Trained
from slimvlm.compress.evaluation.evaluate import evaluate, evaluation_batch
from slimvlm.compress.models.checkpoint import Loaded, locate
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import depths_of
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.options import LearnOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import Progress
from slimvlm.compress.recovery.blockwise.blocks import STAGE, Course, learn_blocks
from slimvlm.compress.recovery.blockwise.lessons import Lesson, WholeTeacher
from slimvlm.compress.recovery.blockwise.pupil import Learnt
from slimvlm.compress.recovery.blockwise.streamed import StreamedTeacher, held_bytes
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import Recipe, make_stages, match_blocks
from slimvlm.compress.recovery.distillation.teacher_cache import TeacherCache
from slimvlm.compress.recovery.training.choice import Validation, validation_of
from slimvlm.compress.recovery.training.history import History, Journal, peak_memory
from slimvlm.compress.recovery.training.order import batch_indices
from slimvlm.compress.recovery.training.stepping import Task
from slimvlm.compress.recovery.training.trainer import train
from slimvlm.compress.run_record import Training
from slimvlm.compress.runs import TEACHER
from slimvlm.compress.streaming.room import TAUGHT


@dataclass(frozen=True)
class Work:
    """The two parts of a recovery, with what both need: each block by itself, then the model as a whole."""

    options: LearnOptions
    recipe: Recipe
    loaded: Loaded
    teacher: PreTrainedModel | None
    data: Trained
    folder: Path
    progress: Progress

    @cached_property
    def collator(self) -> Collator:
        """Of the student's samples."""
        return collator_of(self.loaded)

    def teach_blocks(self, lessons: Sequence[Lesson]) -> tuple[History, list[Learnt]]:
        """What every block learns by itself: the history of that, and what became of each."""
        options = replace(self.options, steps=self.recipe.block_steps(self.options.steps))
        history = History()
        self._judge(history)
        history.steps, began = options.steps, time.perf_counter()
        course = self._course(lessons, options)
        learnt, history.tokens = learn_blocks(self.loaded.model, course, options, self.folder, self._told_of_all)
        history.stepping_seconds = time.perf_counter() - began
        first, last = (
            sum(missed) / len(missed) if (missed := [one for one in ends if one is not None]) else None
            for ends in ([one.before for one in learnt], [one.after for one in learnt])
        )
        history.stages = [
            Training(
                name=STAGE.name,
                steps=options.steps,
                seconds=history.stepping_seconds,
                tokens=history.tokens,
                first_loss=first,
                last_loss=last,
            )
        ]
        history.skipped = max((one.skipped for one in learnt), default=0)
        if not self.recipe.whole:
            self._judge(history)
            Journal(self.folder, 0, processes.rank() == 0).close()  # of a training of the whole, which there is none of
        history.seconds = history.stepping_seconds + history.validation_seconds
        history.peak_memory_bytes = peak_memory(self.loaded.model.device)
        return history, learnt

    def train(self, plan: Plan, blocks: History | None) -> History:
        """The training of the model as a whole, after that of its blocks if there was one; the history of both."""
        done = blocks.steps if blocks else 0
        steps = self.options.steps - done
        options = replace(self.options, steps=steps, warmup=min(self.options.warmup, steps // 4))
        distiller = _distiller(plan, self.loaded, self.teacher, self.recipe)
        task = Task(
            stages=make_stages(self.loaded.family, distiller.depths, self.recipe),
            collate=lambda indices: distiller.located(self._batch(self.data.training, indices)),
            count=len(self.data.training),
            seed=options.seed,
            validate=lambda: self.judge(distiller.student),
            cache=_cache(options, self.data, self.folder.with_name(TEACHER)),
        )
        progress: Progress = self.progress
        if done:

            def progress(stage: str, step: int, _: int, note: str = "") -> None:
                self.progress(stage, done + step, self.options.steps, note)

        history = train(distiller, task, options, self.folder, progress)
        return history.after(blocks) if blocks else history

    def judge(self, model: PreTrainedModel) -> Validation:
        """What the held-out samples say of the student, or of what it became."""
        size = evaluation_batch(model.device, self.options.batch_size)
        return validation_of(evaluate(model, self.collator, self.data.validation, batch_size=size))

    def _course(self, lessons: Sequence[Lesson], options: LearnOptions) -> Course:
        """Steps have the batches that a training of the whole model would have; of a streamed teacher, through which
        all of them go together, the first of them again and again. Held out are all validation samples.
        """
        assert self.teacher is not None
        training, held_out, size = self.data.training, self.data.validation, options.train_batch_size
        order = [tuple(batch_indices(len(training), size, options.seed, step)) for step in range(options.steps)]
        numbers = {chosen: number for number, chosen in enumerate(dict.fromkeys(order))}
        if streamed(self.teacher):
            most = max(1, TAUGHT // held_bytes(self.teacher, self._batch(training, order[0])))
            order = [order[step % most] for step in range(options.steps)]
            numbers = {chosen: number for number, chosen in enumerate(dict.fromkeys(order))}
        looks = [range(first, min(first + size, len(held_out))) for first in range(0, len(held_out), size)]
        batches = [partial(self._batch, training, chosen) for chosen in numbers]
        batches += [partial(self._batch, held_out, chosen) for chosen in looks]
        teaching = StreamedTeacher if streamed(self.teacher) else WholeTeacher
        teacher = teaching(self.teacher, self.loaded.family, batches, options.precision)
        identity = f"{locate(options.teacher or options.model)[1]} {self.data.digest} {options.data_fraction}"
        steps = [numbers[chosen] for chosen in order]
        return Course(lessons, teacher, steps, range(len(numbers), len(batches)), options.seed, identity)

    def _judge(self, history: History) -> None:
        began = time.perf_counter()
        found = self.judge(self.loaded.model)
        history.add_validation(found if all(map(math.isfinite, found.score)) else None, last_stage=True)
        history.validation_seconds += time.perf_counter() - began

    def _batch(self, samples: Sequence[Sample], indices: Sequence[int]) -> Batch:
        return self.collator.training([samples[index] for index in indices])

    def _told_of_all(self, stage: str, step: int, _: int, note: str = "") -> None:
        self.progress(stage, step, self.options.steps, note)


def followed(plan: Plan, teacher: PreTrainedModel, family: Family) -> dict[str, tuple[int, ...]]:
    """Of the towers that lost blocks, the teacher's block that each of the student's follows."""
    depths = depths_of(teacher, family)
    return {
        tower: match_blocks(kept, depths[tower]) for tower, kept in plan.blocks.items() if len(kept) < depths[tower]
    }


def _distiller(plan: Plan, loaded: Loaded, teacher: PreTrainedModel | None, recipe: Recipe) -> Distiller:
    matched = {} if teacher is None else followed(plan, teacher, loaded.family)
    return Distiller(loaded.model, teacher, loaded.family, recipe, matched)


def _cache(options: LearnOptions, data: Trained, folder: Path) -> TeacherCache | None:
    """In `folder`, for this teacher and these samples; what an earlier recovery of the run kept is used again."""
    if options.teacher_cache is None:
        return None
    _, digest = locate(options.teacher or options.model)
    drawn = f"{options.seed} {options.data_fraction} {len(data.validation)}"
    collation = f"{digest} {data.digest} {drawn} {options.dtype} {options.precision} {options.frozen}"
    name = hashlib.sha256(collation.encode()).hexdigest()[:16]
    return TeacherCache(folder / name, options.teacher_cache)
