"""The same reading of the data block by block, of a model whose blocks are not all there: see streaming/passage.py.

What is collected at a block is finished before the next one is looked at, so that sums of one block alone are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.compress import processes
from slimvlm.compress.data.questions import Question, ask
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.computing import undisturbed
from slimvlm.compress.models.families import Family
from slimvlm.compress.statistics.collector import Collector, Side
from slimvlm.compress.statistics.loss import loss
from slimvlm.compress.statistics.reading import Batches, Reading, Seen, Watched
from slimvlm.compress.statistics.rows import STATISTICS
from slimvlm.compress.streaming.blocks import Blocks, blocks_of
from slimvlm.compress.streaming.pages import Pages
from slimvlm.compress.streaming.passage import Passages

STEPS = 2  # of a batch at a block: there, and back

Look = Callable[[Collector], None]
Found = Callable[[Sequence[Side], dict[str, Tensor]], None]  # what was seen of some sides, at once


def check_by_block(statistics: Iterable[str]) -> None:
    """Raises UnsuitableOptionError for those that a model read block by block does not tell."""
    if any(STATISTICS[name].reads == "perturbed" for name in statistics):
        raise UnsuitableOptionError(
            "losses with changed weights need the whole model at once, and it is read block by block; choose "
            "another --allocator, or --stream off"
        )


class ReadingByBlock(Reading):
    """All batches go through a block, and on the way back again, before the next one. What is said of the methods of
    `Reading` holds.
    """

    def __init__(self, *read: Any) -> None:
        super().__init__(*read)
        self.blocks = blocks_of(self.model, self.family)
        self.total *= STEPS * len(self.blocks)

    def collect(self, watched: Watched) -> tuple[Seen, dict[str, int]]:
        """Collectors watch their sides of one block at a time, and those of whole blocks all of them."""
        whole = {one: sides for one, sides in watched.items() if one.statistic.units == "block"}
        with ExitStack() as stack:
            for collector, sides in whole.items():
                stack.enter_context(collector.watch(sides))
            found, counts = self._go({one: sides for one, sides in watched.items() if one not in whole}, [*whole])
            for collector in whole:
                found[collector.statistic.name] |= collector.finish(processes.reduce)
        return found, counts

    def read(self, collectors: Sequence[Collector]) -> dict[str, int]:
        """They watch on their own, all the way."""
        return self._go({}, collectors)[1]

    def _go(self, watched: Watched, always: Sequence[Collector]) -> tuple[Seen, dict[str, int]]:
        everyone = [*watched, *always]
        check_by_block(collector.statistic.name for collector in everyone)
        counted, asked, pages = self.counts(), dict[int, Question](), Pages()
        for index in self.indices:
            if (question := self.question(index, len(asked), counted)) is not None:
                asked[index] = replace(question, inputs=pages.own(question.inputs))
        if len(asked) < len(self.indices):
            self.told(STEPS * len(self.blocks) * (len(self.indices) - len(asked)))
        learning = any(collector.statistic.reads == "backward" for collector in everyone)
        forwards = [partial(loss, self.model, question, self.threshold) for question in asked.values()]
        passages = Passages(self.model, self.blocks, forwards, learning, pages)
        del forwards  # with the inputs, which go when a forward has ended
        indices, questions = list(asked), [replace(question, inputs={}) for question in asked.values()]
        asked.clear()
        seen: Seen = {collector.statistic.name: {} for collector in everyone}

        def close(number: int, active: Sequence[Collector]) -> None:
            for collector in active:
                if collector.statistic.reads == "backward":
                    collector.close_batch(indices[number], passages.results[number][0])
            self.told(STEPS // (1 + learning))

        def finish(collector: Collector, _: Sequence[Side]) -> None:
            self.require_finite([collector])
            seen[collector.statistic.name] |= collector.finish(processes.reduce)

        order = [*self.blocks, *self.blocks[::-1]] if learning else self.blocks
        with _Sweep(passages, questions, order, close, finish) as sweep:
            if learning:
                passages.forward(sweep.at, sweep.see, sweep.seen)
            sweep.watched, sweep.active = watched, list(always)
            go = passages.backward if learning else passages.forward  # on the way back blocks are computed again
            go(sweep.at, sweep.see, sweep.seen)
        selected = sum(int(tokens) for _, tokens in passages.results)
        return seen, self.over_processes({**counted, "selected_tokens": selected})


def look_by_block(
    read: tuple[nn.Module, Family, Batches],
    collector: Collector,
    sides: Sequence[Side],
    found: Found,
    told: Callable[[int, int], None],
) -> None:
    """Have a model read the batches in forward passes alone while `collector` watches; what was `found` of the sides of
    a block is told while the block is there. Of several processes each reads its share.
    """
    model, family, batches = read
    blocks, steps = blocks_of(model, family), count(1)
    passages, questions = _passages(model, family, batches)
    with (
        undisturbed(model),
        _Sweep(
            passages,
            questions,
            blocks,
            lambda *_: told(next(steps), len(blocks) * len(questions)),
            lambda _, chosen: found(chosen, collector.finish(processes.reduce)),
        ) as sweep,
    ):
        sweep.watched = {collector: sides}
        passages.forward(sweep.at, sweep.see, sweep.seen)


def change_by_block(model: nn.Module, family: Family, batches: Batches, change: Callable[[str, Look], None]) -> None:
    """Have a model read the batches in forward passes alone, and its blocks change on the way: each reads what those
    before it have become. Of several processes each reads its share, and all change the same.

    Args:
        change: may change the weights of the block of a path; its second argument lets a collector see, as often as it
            likes, what the block makes of the batches as it is then.
    """
    passages, questions = _passages(model, family, batches)
    with undisturbed(model), torch.no_grad(), Blocks(model, blocks_of(model, family)) as there:

        @contextmanager
        def at(path: str) -> Iterator[None]:
            with there.held(path, changed=True):
                change(path, lambda seer: passages.look(path, lambda number: seer.see(questions[number])))
                yield

        passages.forward(at, lambda _: None, lambda _: None)


def _passages(model: nn.Module, family: Family, batches: Batches) -> tuple[Passages, list[Question]]:
    """Forwards of this process's share of the batches, those in which something counts; what is asked in each, without
    the inputs: these go when a forward has ended.
    """
    pages, here = Pages(), (batches[index] for index in processes.share(len(batches)))
    asked = (ask(model, family, batch() if callable(batch) else batch) for batch in here)
    questions = [replace(question, inputs=pages.own(question.inputs)) for question in asked if question is not None]
    forwards = [partial(_forward, model, question) for question in questions]
    passages = Passages(model, blocks_of(model, family), forwards, learning=False, pages=pages)
    return passages, [replace(question, inputs={}) for question in questions]


def _forward(model: nn.Module, question: Question) -> None:
    """Of the logits as few as can be."""
    unread = {"logits_to_keep": 1} if "logits_to_keep" in question.inputs else {}
    model(**{**question.inputs, **unread})


class _Sweep(Blocks):
    """One way through all blocks.

    Args:
        close: told of every batch after every block, by its number among `questions`, with those who watch there.
        finish: told who has watched which sides of a block.

    Attributes:
        watched: who watches what; block by block.
        active: those who watch now.
    """

    def __init__(
        self,
        passages: Passages,
        questions: Sequence[Question],
        order: Sequence[str],
        close: Callable[[int, Sequence[Collector]], None],
        finish: Callable[[Collector, Sequence[Side]], None],
    ) -> None:
        super().__init__(passages.model, order)
        self.passages, self.questions, self.close, self.finish = passages, questions, close, finish
        self.watched: Watched = {}
        self.active: list[Collector] = []

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """The block is there, and watched."""
        of_block = {one: [side for side in sides if side.block == path] for one, sides in self.watched.items()}
        here = {one: sides for one, sides in of_block.items() if sides}
        with ExitStack() as stack:
            if here or self.passages.asked(path):
                stack.enter_context(self.held(path))
            for collector, sides in here.items():
                stack.enter_context(collector.watch(sides))
            self.active += here
            yield
            for collector, sides in here.items():
                self.active.remove(collector)
                self.finish(collector, sides)

    def see(self, number: int) -> None:
        """A block comes that is computed for a batch."""
        for collector in self.active:
            collector.see(self.questions[number])

    def seen(self, number: int) -> None:
        """It was."""
        self.close(number, self.active)
