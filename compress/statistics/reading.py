"""One reading of the data: every batch of this process is asked, and collectors watch what the model makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace

import torch
from torch import Tensor, nn

from slimvlm.compress import processes
from slimvlm.compress.data.questions import Question, Tally, ask
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.families import Family
from slimvlm.compress.progress import Progress
from slimvlm.compress.statistics.collector import Collector, Side
from slimvlm.compress.statistics.loss import loss
from slimvlm.compress.statistics.pools import choice
from slimvlm.compress.statistics.rows import CalibrationOptions

CHECK_EVERY = 32  # batches between two looks at the non-finite flags: each look waits for the device

Batch = Mapping[str, Tensor]
Batches = Sequence[Batch | Callable[[], Batch]]
Seen = dict[str, dict[str, Tensor]]  # by the name of a statistic
Watched = Mapping[Collector, Sequence[Side]]  # who watches what


class Reading:
    """The batches of this process, and the counts over all processes."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        batches: Batches,
        options: CalibrationOptions,
        progress: Progress,
        passes: int,
    ) -> None:
        self.model, self.family, self.batches, self.threshold = model, family, batches, options.tokens.threshold
        self.counting = choice("all")
        self.indices = processes.share(len(batches))
        self.device = next(model.parameters()).device
        self.progress = progress
        self.done, self.total = 0, passes * len(self.indices)

    def collect(self, watched: Watched) -> tuple[Seen, dict[str, int]]:
        """One pass over this process's batches, in which every collector watches its sides: what was seen, and the
        counts over all processes.
        """
        seen: Seen = {collector.statistic.name: {} for collector in watched}
        with ExitStack() as stack:
            for collector, sides in watched.items():
                stack.enter_context(collector.watch(sides))
            counts = self.read(list(watched))
            for collector in watched:
                seen[collector.statistic.name] |= collector.finish(processes.reduce)
        return seen, counts

    def read(self, collectors: Sequence[Collector]) -> dict[str, int]:
        """One pass over this process's batches while `collectors` watch; the counts over all processes."""
        counted, asked = self.counts(), 0
        selected = torch.zeros((), dtype=torch.int64, device=self.device)
        for index in self.indices:
            question = self.question(index, asked, counted)
            if question is not None:
                selected += self._answer(index, question, collectors)
                asked += 1
                if processes.count() == 1 and asked % CHECK_EVERY == 0:
                    self.require_finite(collectors)
            self.told(1)
        self.require_finite(collectors)
        return self.over_processes({**counted, "selected_tokens": int(selected)})

    def question(self, index: int, asked: int, counted: Counter[str]) -> Question | None:
        """A batch as a question, after `asked` others, once it is `counted`; None: nothing in it counts."""
        batch = self.batches[index]
        batch = batch() if callable(batch) else batch
        question = ask(self.model, self.family, batch)
        if question is None:
            counted["skipped"] += len(batch["input_ids"])
            return None
        counted.update(asdict(question.tally))
        return replace(question, masks=self.counting(asked, question))

    def counts(self) -> Counter[str]:
        """Nothing counted yet."""
        return Counter(dict.fromkeys((field.name for field in fields(Tally)), 0))

    def told(self, steps: int) -> None:
        """So many of `total` are done."""
        self.done += steps
        self.progress("calibrate", self.done, self.total)

    def _answer(self, index: int, question: Question, collectors: Sequence[Collector]) -> Tensor:
        """Forward of one batch, and backward where a collector reads it; the number of tokens that gave a gradient."""
        for collector in collectors:
            collector.see(question)
        if all(collector.statistic.reads == "perturbed" for collector in collectors):
            with torch.no_grad():
                for collector in collectors:
                    collector.perturb(index, len(self.batches), lambda: loss(self.model, question, None)[0])
            return torch.zeros((), dtype=torch.int64, device=self.device)
        learning = [collector for collector in collectors if collector.statistic.reads == "backward"]
        with torch.set_grad_enabled(bool(learning)):
            value, tokens = loss(self.model, question, self.threshold)
            if value.requires_grad:  # not so where the loss reaches no weight of this pass
                value.backward()
        for collector in learning:
            collector.close_batch(index, value.detach())
        return tokens

    def require_finite(self, collectors: Iterable[Collector]) -> None:
        """See `Collector`."""
        for collector in collectors:
            collector.require_finite(len(self.batches), processes.reduce)

    def over_processes(self, counted: Mapping[str, int]) -> dict[str, int]:
        """The counts of all of them.

        Raises:
            CalibrationError: no sample counts.
        """
        totals = torch.tensor(list(counted.values()))
        processes.reduce(totals, "sum")
        counts = dict(zip(counted, totals.tolist(), strict=True))
        if not counts["samples"]:
            raise CalibrationError(
                f"none of the {counts['skipped']} calibration samples can count: they have no supervised (answer) "
                "token, or, for a dual encoder, every batch holds a single pair; check the answers and the batch size"
            )
        return counts
