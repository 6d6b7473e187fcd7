"""The same reading of the data block by block, of a model whose blocks are not all there: see streaming/passage.py.

What is collected at a block is finished before the next one is looked at, so that sums of one block alone are held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from slimvlm.compress import processes
from slimvlm.compress.data.questions import Question
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.statistics.collector import Collector
from slimvlm.compress.statistics.loss import loss
from slimvlm.compress.statistics.reading import Reading, Seen, Watched
from slimvlm.compress.streaming.blocks import Blocks, blocks_of
from slimvlm.compress.streaming.passage import Passages

STEPS = 2  # of a batch at a block: there, and back


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
        if any(collector.statistic.reads == "perturbed" for collector in everyone):
            raise UnsuitableOptionError(
                "losses with changed weights need the whole model at once, and it is read block by block; choose "
                "another --allocator, or --stream off"
            )
        counted, asked = self.counts(), dict[int, Question]()
        for index in self.indices:
            if (question := self.question(index, len(asked), counted)) is not None:
                asked[index] = question
        self.told(STEPS * len(self.blocks) * (len(self.indices) - len(asked)))
        learning = any(collector.statistic.reads == "backward" for collector in everyone)
        forwards = [partial(loss, self.model, question, self.threshold) for question in asked.values()]
        passages = Passages(self.model, self.blocks, forwards, learning)
        if learning:
            with _Sweep(self, passages, asked, self.blocks) as there:
                passages.forward(there.at, there.see, there.seen)
        with _Sweep(self, passages, asked, self.blocks[::-1] if learning else self.blocks) as sweep:
            sweep.watched, sweep.active = watched, list(always)
            go = passages.backward if learning else passages.forward  # on the way back blocks are computed again
            go(sweep.at, sweep.see, sweep.seen)
        selected = sum(int(tokens) for _, tokens in passages.results)
        return sweep.found, self.over_processes({**counted, "selected_tokens": selected})


class _Sweep(Blocks):
    """One way through all blocks.

    Attributes:
        watched: who watches what; block by block.
        active: those who watch now.
        found: what was seen.
    """

    def __init__(
        self, reading: ReadingByBlock, passages: Passages, asked: Mapping[int, Question], order: Sequence[str]
    ) -> None:
        super().__init__(reading.model, order)
        self.reading, self.passages = reading, passages
        self.indices, self.questions = list(asked), list(asked.values())
        self.steps = STEPS // (1 + passages.learning)
        self.watched: Watched = {}
        self.active: list[Collector] = []
        self.found: Seen = defaultdict(dict)

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """The block is there, and watched."""
        of_block = {
            collector: [side for side in sides if side.block == path] for collector, sides in self.watched.items()
        }
        here = [collector for collector, sides in of_block.items() if sides]
        with ExitStack() as stack:
            if here or self.passages.asked(path):
                stack.enter_context(self.held(path))
            for collector in here:
                stack.enter_context(collector.watch(of_block[collector]))
            self.active += here
            yield
            self.reading.require_finite(here)
            for collector in here:
                self.active.remove(collector)
                self.found[collector.statistic.name] |= collector.finish(processes.reduce)

    def see(self, number: int) -> None:
        """A block comes that is computed for a batch."""
        for collector in self.active:
            collector.see(self.questions[number])

    def seen(self, number: int) -> None:
        """It was."""
        for collector in self.active:
            if collector.statistic.reads == "backward":
                collector.close_batch(self.indices[number], self.passages.results[number][0])
        self.reading.told(self.steps)
