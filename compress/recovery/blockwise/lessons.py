"""What every block of a cut model is to learn, and the dense model's answers to that.

A block of the student is given what its place in the dense model is given there, and is to put out what the dense model
has there. No block needs another one's result, so they can learn at the same time, one after the other, or elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol  # Any: what transformers' blocks take and put out

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.compress.data.collate import Batch
from slimvlm.compress.data.questions import PATCHES, Inputs, Masks, patch_mask, placed, pose, stream_through
from slimvlm.compress.models.computing import in_passes
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import count_parameters, depths_of
from slimvlm.compress.recovery.distillation.recipe import match_blocks
from slimvlm.compress.recovery.training.stepping import tokens_of
from slimvlm.compress.recovery.training.workers import autocast

TAUGHT_AT_ONCE = 4 * 2**30  # bytes that the learning of all blocks of a pass may take
HIDDEN = "hidden_states"


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one block of the student learns.

    Attributes:
        path: the block.
        place: the dense block that it is left of: it is called as that one.
        first, last: it does the work of these dense blocks and those between: what the first is given it is given, what
            the last puts out it is to put out. Where no block left, both are its place.
        stream: the tokens that go through it (see `data.questions`).
    """

    path: str
    place: str
    first: str
    last: str
    stream: str


class Taught(NamedTuple):
    """One batch of a lesson: arguments of the block, the output to learn, and the tokens that count (None: all)."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    mask: Tensor | None


class Reading(NamedTuple):
    """One batch of some lessons, by their paths, and its input tokens without padding."""

    taught: Mapping[str, Taught]
    tokens: int


class Teacher(Protocol):
    """The dense model's answers to a fixed sequence of batches, in whatever order it can give them."""

    def passes(self, lessons: Sequence[Lesson], size: Callable[[Lesson], int]) -> Iterator[Sequence[Lesson]]:
        """The lessons that can be read together, all of them in turn; what was given is done with the next one.

        Args:
            size: bytes that learning a lesson takes.
        """
        ...

    def read(self, number: int, lessons: Sequence[Lesson]) -> Reading:
        """Batch `number` of these lessons, which are of the last pass."""
        ...


class _SeenAllError(Exception):
    """Ends a forward; never leaves this module."""


class WholeTeacher:
    """A dense model in memory: every read is a forward up to the last block that is asked for.

    Args:
        batches: functions that make a padded training batch.
        precision: of matrix products, as a training's.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, batches: Sequence[Callable[[], Batch]], precision: str = "no"
    ) -> None:
        self.model, self.family, self.batches, self.precision = model, family, batches, precision

    def passes(self, lessons: Sequence[Lesson], size: Callable[[Lesson], int]) -> Iterator[Sequence[Lesson]]:
        """As many at once as memory is meant for: each forward then serves them all."""
        yield from in_passes(lessons, size, TAUGHT_AT_ONCE)

    @torch.no_grad()
    def read(self, number: int, lessons: Sequence[Lesson]) -> Reading:
        """See `Teacher`."""
        batch, watched = self.batches[number](), _Watched(lessons)
        inputs, masks = asked_of(self.model, self.family, batch)
        with watched.on(self.model), suppress(_SeenAllError), autocast(self.model.device, self.precision):
            self.model(**inputs)
        taught = {lesson.path: watched.taught(lesson, masks.get(lesson.stream)) for lesson in lessons}
        return Reading(taught, tokens_of(batch))


class _Watched:
    """What goes into and comes out of the dense blocks of some lessons, in one forward, which ends with the last."""

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self.lessons = lessons
        self.given: dict[str, Tensor] = {}
        self.called: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.outputs: dict[str, Tensor] = {}

    def on(self, model: nn.Module) -> ExitStack:
        """Hooks that leave with the block."""
        hooks = ExitStack()
        for lesson in self.lessons:
            first, place, last = (model.get_submodule(path) for path in (lesson.first, lesson.place, lesson.last))
            hooks.enter_context(first.register_forward_pre_hook(partial(self._first, lesson.path), with_kwargs=True))
            hooks.enter_context(place.register_forward_pre_hook(partial(self._place, lesson.path), with_kwargs=True))
            hooks.enter_context(last.register_forward_hook(partial(self._last, lesson.path)))
        return hooks

    def taught(self, lesson: Lesson, mask: Tensor | None) -> Taught:
        """Of a forward that is over."""
        called = with_hidden(*self.called[lesson.path], self.given[lesson.path])
        return Taught(*called, self.outputs[lesson.path], mask)

    # Cloned: blocks and what is between them may write into what they are given.

    def _first(self, path: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.given[path] = hidden_of(args, kwargs).clone()

    def _place(self, path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.called[path] = args, kwargs

    def _last(self, path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.outputs[path] = output_of(output).clone()
        if len(self.outputs) == len(self.lessons):
            raise _SeenAllError


def asked_of(model: PreTrainedModel, family: Family, batch: Batch) -> tuple[Inputs, Masks]:
    """(arguments of the model's forward, by stream the tokens that count), where the model is."""
    weight, posed = next(model.parameters()), pose(model, family, batch)
    masks = placed({**posed.masks, PATCHES: patch_mask(model, batch)}, weight.device)
    return placed(posed.inputs, weight.device, weight.dtype), masks


def hidden_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block."""
    found: Tensor = args[0] if args else kwargs[HIDDEN]
    return found


def with_hidden(
    args: Sequence[Any], kwargs: Mapping[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with other hidden states."""
    return ((hidden, *args[1:]), {**kwargs}) if args else ((), {**kwargs, HIDDEN: hidden})


def output_of(output: Any) -> Tensor:
    """The hidden states that a block puts out, with others or alone."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def lessons_of(
    student: nn.Module, dense: nn.Module, family: Family, left: Mapping[str, tuple[int, ...]]
) -> list[Lesson]:
    """Of every block of the student that was cut, or is followed or preceded by one that left; in the order of towers.

    Args:
        student: without low-rank layers yet.
        dense: may be on the meta device.
        left: tower -> the dense blocks that stayed; missing: all.
    """
    lessons = []
    depths = depths_of(dense, family)
    for tower in family.towers:
        depth = depths[tower.name]
        kept = left.get(tower.name, tuple(range(depth)))
        first = 0
        for layer, (place, last) in enumerate(zip(kept, match_blocks(kept, depth), strict=True)):
            path, there, begin, end = (f"{tower.blocks}.{index}" for index in (layer, place, first, last))
            if first != last or _parameters(student, path) != _parameters(dense, there):
                lessons.append(Lesson(path, there, begin, end, stream_through(family, tower)))
            first = last + 1
    return lessons


def _parameters(model: nn.Module, path: str) -> int:
    return count_parameters(model.get_submodule(path))
