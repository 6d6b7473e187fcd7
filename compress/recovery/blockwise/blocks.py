"""Block-wise recovery: every block that was cut learns the dense block's output from the dense block's input.

No block waits for another, and none needs more than itself and the dense model's answers. It is a start for the
training of the whole model, or all there is where that has no room.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from slimvlm.compress import processes
from slimvlm.compress.errors import RecoveryError
from slimvlm.compress.files.folders import require_room
from slimvlm.compress.options import TrainOptions
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.recovery.blockwise.lessons import Lesson, Teacher
from slimvlm.compress.recovery.blockwise.pupil import Learnt, Pupil, bytes_of
from slimvlm.compress.recovery.distillation.recipe import Stage
from slimvlm.compress.recovery.training.schedule import Schedule, check_training
from slimvlm.compress.recovery.training.trainer import TERMINATED, sigterms
from slimvlm.compress.streaming.blocks import Blocks

STAGE = Stage("blocks", (), {}, 1.0)


@dataclass(frozen=True)
class Course:
    """What the blocks of a student learn, and from what.

    Attributes:
        lessons: what is learnt.
        teacher: whose batches `steps` and `held_out` number.
        steps: the batch of every step.
        held_out: the batches by which a state is judged.
        seed: of dropout.
        identity: of the teacher and the data: what is kept of a course is for no other.
    """

    lessons: Sequence[Lesson]
    teacher: Teacher
    steps: Sequence[int]
    held_out: Sequence[int]
    seed: int = 0
    identity: str = ""


def learn_blocks(
    student: nn.Module, course: Course, options: TrainOptions, folder: Path, progress: Progress = silent
) -> tuple[list[Learnt], int]:
    """Teach the blocks of the student, in place: each ends with the best of its states, which may be the one it had.
    Of a student that is streamed, blocks are in memory while they learn; it reads what they learnt from their files.

    Several processes each take every so-manieth block, and find those of the others in their files.

    Args:
        options: `steps` are those of every block; every one has its own optimiser.
        folder: of the files of the blocks: what is there of this course is not learnt again.
        progress: called after every step, with ("recover", step, steps, blocks and what they miss).

    Returns:
        What became of each lesson, and the input tokens of the steps of a block.

    Raises:
        RecoveryError: the files of another process are not there.
        OutputError: the folder cannot be written, or what blocks learn with has no room there.
        SystemExit: after SIGTERM, with everything saved.
    """
    options = replace(options, warmup=min(options.warmup, options.steps // 4))
    check_training(options)
    size = bytes_of(student, course.lessons)
    require_room(folder, sum(size.values()))
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(course, options)
    pupils = [Pupil(student, lesson, options, folder, identity, course.seed) for lesson in course.lessons]
    pupils = [pupil for pupil in pupils if pupil.trained]
    mine = pupils[processes.rank() :: processes.count()]
    left = {pupil.lesson.path: pupil for pupil in mine if not pupil.finished()}
    tokens = 0
    cuda = {pupil.device for pupil in mine if pupil.device.type == "cuda"}
    with torch.random.fork_rng(cuda), sigterms() as signals, Blocks(student, []) as blocks:
        lessons = [pupil.lesson for pupil in left.values()]
        for chosen in course.teacher.passes(lessons, lambda lesson: size[lesson.path] + _read_for(student, lesson)):
            taught = [left[lesson.path] for lesson in chosen]
            told = partial(_tell, mine, options, progress)
            with ExitStack() as here:
                for lesson in chosen:
                    here.enter_context(blocks.held(lesson.path))
                tokens = max(tokens, _teach(taught, course, options, signals, told))
            for pupil in taught:
                pupil.settle()
    processes.wait_for_all()
    for pupil in pupils:
        if pupil not in mine and not pupil.finished():
            raise RecoveryError(f"{pupil.file} is not there; all processes need the same folder, on a disk they share")
    return [pupil.learnt for pupil in pupils], tokens


def _read_for(student: nn.Module, lesson: Lesson) -> int:
    """Bytes of a block that are not in memory yet."""
    return sum(value.nbytes for value in student.get_submodule(lesson.path).parameters() if value.is_meta)


def _teach(
    pupils: Sequence[Pupil], course: Course, options: TrainOptions, signals: list[int], tell: Callable[[], None]
) -> int:
    """All steps of the pupils that are not made yet; the input tokens that were read in them."""
    schedule, tokens = Schedule((STAGE,), options), 0
    for pupil in pupils:
        pupil.begin()
    for step in range(min(pupil.learnt.steps for pupil in pupils), options.steps + 1):
        here = [pupil for pupil in pupils if pupil.learnt.steps == step]
        if step % options.validate_every == 0 or step == options.steps:
            _judge([pupil for pupil in here if pupil.learnt.judged < step], course)
        if step == options.steps:
            break
        reading = course.teacher.read(course.steps[step], [pupil.lesson for pupil in here])
        for pupil in here:
            pupil.learn(reading.taught[pupil.lesson.path], schedule.learning_rate(step))
        tokens += reading.tokens
        if signals or (step + 1) % options.checkpoint_every == 0:
            for pupil in here:
                pupil.save()
        if signals:
            raise SystemExit(TERMINATED)
        tell()
    for pupil in pupils:
        pupil.end()
    return tokens


def _judge(pupils: Sequence[Pupil], course: Course) -> None:
    for number in course.held_out if pupils else ():
        reading = course.teacher.read(number, [pupil.lesson for pupil in pupils])
        for pupil in pupils:
            pupil.look(reading.taught[pupil.lesson.path])
    for pupil in pupils:
        pupil.judge()


def _tell(pupils: Sequence[Pupil], options: TrainOptions, progress: Progress) -> None:
    missed = [pupil.learnt.after for pupil in pupils if pupil.learnt.after is not None]
    note = f"{STAGE.name}: {len(pupils)}, {sum(missed) / len(missed):.3g} of their outputs' energy missed"
    progress("recover", sum(pupil.learnt.steps for pupil in pupils) // len(pupils), options.steps, note)


def _identity(course: Course, options: TrainOptions) -> str:
    """What must be the same for a block to go on from its file; how often that is written may change."""
    names = {one.name for one in fields(TrainOptions)} - {"checkpoint_every"}
    settings = {name: getattr(options, name) for name in sorted(names)}
    lessons = [asdict(lesson) for lesson in course.lessons]
    facts = [settings, lessons, list(course.steps), len(course.held_out), course.seed, course.identity]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
