"""The answers of a dense model whose blocks are read one after the other: see compress/streaming.

All batches come to a block together. The lesson that ends there is learnt meanwhile, as often as it likes, and then
they go on: what they had read is put away meanwhile beyond a bound (see streaming/pages.py), and of the dense model one
block and the one that comes next are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast  # Any: what transformers' blocks take

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from slimvlm.compress.data.collate import Batch
from slimvlm.compress.data.questions import Masks
from slimvlm.compress.models.families import Family
from slimvlm.compress.recovery.blockwise.lessons import (
    Lesson,
    Reading,
    Taught,
    asked_of,
    hidden_of,
    output_of,
    with_hidden,
)
from slimvlm.compress.recovery.training.stepping import tokens_of
from slimvlm.compress.recovery.training.workers import autocast
from slimvlm.compress.streaming.forwards import through_blocks
from slimvlm.compress.streaming.pages import Pages
from slimvlm.compress.streaming.passage import Passages
from slimvlm.compress.streaming.room import BESIDE

Called = tuple[tuple[Any, ...], Mapping[str, Any]]


class StreamedTeacher:
    """A dense model whose blocks need not be there. Arguments as of `WholeTeacher`."""

    def __init__(
        self, model: PreTrainedModel, family: Family, batches: Sequence[Callable[[], Batch]], precision: str = "no"
    ) -> None:
        self.model, self.family, self.batches, self.precision = model, family, batches, precision
        self._masks: dict[int, Masks] = {}
        self._tokens: dict[int, int] = {}
        self._given: dict[str, list[Tensor]] = {}  # by lesson, of every batch
        self._called: dict[str, list[Called]] = {}
        self._here: list[Called] = []  # how the block where all batches are is called
        self._compute: Callable[..., Any]
        self._pages: Pages

    def passes(self, lessons: Sequence[Lesson], size: Callable[[Lesson], int]) -> Iterator[Sequence[Lesson]]:
        """One lesson at a time, in the order in which batches come to its end."""
        lane, left = greenlet(partial(self._go, lessons)), len(lessons)
        try:
            while left and (lesson := self._next(lane)) is not None:
                yield [lesson]
                left -= 1
        finally:
            lane.throw()  # what comes after the last lesson is nobody's

    @torch.no_grad()
    def read(self, number: int, lessons: Sequence[Lesson]) -> Reading:
        """See `Teacher`."""
        taught = {}
        self._pages.settle()  # what was given is done with
        for lesson in lessons:
            (args, kwargs), mask = self._here[number], self._masks[number].get(lesson.stream)
            needed = args, kwargs, self._called[lesson.path][number], self._given[lesson.path][number], mask
            self._pages.bring(tree_leaves(needed))
            args, kwargs = with_hidden(args, kwargs, hidden_of(args, kwargs).clone())  # a block may write into it
            with self._pages, autocast(hidden_of(args, kwargs).device, self.precision):
                output = output_of(self._compute(*args, **kwargs))
            called = with_hidden(*self._called[lesson.path][number], self._given[lesson.path][number].clone())
            taught[lesson.path] = Taught(*called, output, mask)
        return Reading(taught, self._tokens[number])

    @staticmethod
    def _next(lane: greenlet) -> Lesson | None:
        """Let the batches go on to the end of the next lesson; None: there is none. The grad mode is this side's."""
        mode = torch.is_grad_enabled()
        try:
            found = lane.switch()
        finally:
            torch.set_grad_enabled(mode)
        return None if lane.dead else found

    def _go(self, lessons: Sequence[Lesson]) -> None:
        """Through all blocks, with a stop at the end of every lesson."""

        @contextmanager
        def around(path: str, passages: Passages) -> Iterator[None]:
            self._stop(path, passages, lessons)
            with autocast(self.model.device, self.precision):
                yield

        forwards = [partial(self._forward, number) for number in range(len(self.batches))]
        through_blocks(self.model, self.family, forwards, around)

    def _stop(self, path: str, passages: Passages, lessons: Sequence[Lesson]) -> None:
        """Keep what lessons need of this block; have those learnt that end here."""
        calls = [one.call for one in passages.passages if one.call is not None and one.call.path == path]
        called: list[Called] = [(call.args, call.kwargs) for call in calls]
        for lesson in lessons:
            if lesson.first == path:
                self._given[lesson.path] = [_own(passages.pages, hidden_of(*one)) for one in called]
            if lesson.place == path:
                self._called[lesson.path] = called
        for lesson in lessons:
            if lesson.last == path:
                self._here, self._compute, self._pages = called, passages.compute[path], passages.pages
                try:
                    cast(greenlet, getcurrent().parent).switch(lesson)
                except GreenletExit:  # nobody asks for what comes after: nothing of it is to be brought back
                    for waiting in (calls, called, self._given, self._called):
                        waiting.clear()
                    raise
                torch.set_grad_enabled(False)
                del self._given[lesson.path], self._called[lesson.path]
        self._here = []

    def _forward(self, number: int) -> None:
        batch = self.batches[number]()
        inputs, masks = asked_of(self.model, self.family, batch)
        self._masks[number], self._tokens[number] = masks, tokens_of(batch)
        self.model(**inputs)


def _own(pages: Pages, hidden: Tensor) -> Tensor:
    pages.bring([hidden])
    own = hidden.clone()
    pages.add([own])
    pages.settle()
    return own


def held_bytes(model: PreTrainedModel, batch: Batch) -> int:
    """About what a batch takes while it is on its way through a streamed model."""
    weight, config = next(model.parameters()), model.config.get_text_config()
    states: int = (1 + BESIDE) * batch["input_ids"].numel() * config.hidden_size * weight.element_size()
    return states + sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))
