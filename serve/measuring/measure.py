"""Cells, measured: the dense and the slim model take turns, each in a process of its own, until it is decided.

A turn of a small model holds several runs and gives their median, so that what a switch of processes costs (cold
caches) does not count. Which model goes first changes every round, so that a drift of the clock favours neither. Both
processes are started anew every few rounds: where a process's memory lies, and on which cores it runs, stays as it is
while it lives, and changes its times by more than its rounds differ.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace

from slimvlm.serve.judging.intervals import MIN_ROUNDS, decoder_test, paired_ratio, summarize_cell
from slimvlm.serve.measuring.bench import Source
from slimvlm.serve.measuring.worker import Worker, WorkerLostError
from slimvlm.serve.measuring.workload import Inputs
from slimvlm.serve.profile import MEASURED, TOO_NOISY, Cell, DecoderTest, Memory, Run

TURN_SECONDS, MOST_REPEATS = 0.05, 20  # so long a turn is to be; so many runs it may hold
ROUNDS = 4  # of one start
ENERGY_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a cell is measured.

    Attributes:
        warmup: runs of each model before the first round of a start.
        starts: of both processes, at least; after as many more it is asked again whether all is decided.
        rounds: at most so many over all starts, but one of each start in any case.
        seconds: no further start is made after so many; a start takes no further round after its share of them.
        seed: of the bootstrap.
    """

    warmup: int
    starts: int
    rounds: int
    seconds: float
    seed: int

    @property
    def least(self) -> int:
        """Rounds of a start that are run however long they take, so that all starts together allow a statement."""
        return min(self.most, math.ceil(MIN_ROUNDS / self.starts))

    @property
    def most(self) -> int:
        """Rounds of a start."""
        return max(1, min(ROUNDS, self.rounds // self.starts))


@dataclass(slots=True)
class _Found:
    """What one model did in all starts; `seconds`: phase -> start -> round."""

    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    energy: float | None = None
    dtype: str = ""

    def run(self) -> Run:
        """As it stands in a profile."""
        seconds = {phase: tuple(map(tuple, starts)) for phase, starts in self.seconds.items()}
        return Run(seconds, tuple(self.loads), _most(self.memory), self.energy)


def measure_cell(sources: Mapping[str, Source], inputs: Inputs, effort: Effort) -> Cell:
    """One workload on one backend.

    Args:
        sources: `slim`, or `dense` and `slim`; the cell's backend is that of `slim`.

    Raises:
        SlimvlmError: a model was refused; what a process dies of is in the cell instead.
    """
    slim = sources["slim"]
    cell = Cell(
        slim.backend, slim.dtype, inputs.rows, inputs.image_size, inputs.prompt_tokens, inputs.new_tokens, MEASURED
    )
    try:
        found = _measure(sources, inputs, effort)
        runs = {name: one.run() for name, one in found.items()}
        return summarize_cell(replace(cell, dtype=found["slim"].dtype, runs=runs), effort.seed)
    except WorkerLostError as lost:
        cell = replace(cell, status=lost.status, reason=str(lost))
        if lost.model != "dense":
            return cell
        # What the dense model cannot do at all the slim one may do: that is worth knowing.
        alone = measure_cell({"slim": slim}, inputs, effort)
        return replace(cell, dtype=alone.dtype, runs=alone.runs)


def measure_decoder(
    sources: Mapping[str, Source], tests: Mapping[str, tuple[Inputs, str, int]], effort: Effort
) -> list[DecoderTest]:
    """The language model alone.

    Args:
        tests: name -> inputs, the phase whose seconds count, and for how many tokens.
    """
    slim, done = sources["slim"], []
    for name, (inputs, phase, tokens) in tests.items():
        what = slim.backend, slim.dtype, name
        try:
            found = _measure(sources, inputs, effort)
        except WorkerLostError as lost:
            done.append(DecoderTest(*what, tokens, lost.status, str(lost)))
            continue
        count = tokens if phase == "prefill" else 1
        rates = {
            model: [[count / seconds for seconds in rounds] for rounds in one.seconds[phase]]
            for model, one in found.items()
        }
        done.append(decoder_test((slim.backend, found["slim"].dtype, name), tokens, rates, effort.seed))
    return done


def _measure(sources: Mapping[str, Source], inputs: Inputs, effort: Effort) -> dict[str, _Found]:
    """Model -> what it did, over as many starts as it takes to decide and `effort` allows."""
    found = {name: _Found() for name in sources}
    began = time.perf_counter()
    for start in range(1, max(effort.starts, effort.rounds // effort.most) + 1):
        _start(sources, inputs, effort, found)
        if start < effort.starts:
            continue
        # Asking after every start would find a difference by chance sooner or later.
        if time.perf_counter() - began > effort.seconds or (
            start % effort.starts == 0 and _is_decided(found, effort.seed)
        ):
            break
    return found


def _start(sources: Mapping[str, Source], inputs: Inputs, effort: Effort, found: Mapping[str, _Found]) -> None:
    """Adds to `found` what fresh processes do."""
    first = not next(iter(found.values())).loads
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, source)) for name, source in sources.items()}
        for name, worker in workers.items():
            loaded = worker.call("load")
            found[name].loads.append(loaded["seconds"])
            found[name].dtype = loaded["dtype"]
        for name, phases in _take_turns(workers, inputs, effort).items():
            for phase, rounds in phases.items():
                found[name].seconds.setdefault(phase, []).append(rounds)
        for name, worker in workers.items():
            if first:
                energy = worker.call("joules_per_token", inputs.new_tokens, inputs.rows, ENERGY_SECONDS)
                found[name].energy = energy
            found[name].memory.append(worker.call("memory"))


def _take_turns(workers: Mapping[str, Worker], inputs: Inputs, effort: Effort) -> dict[str, dict[str, list[float]]]:
    """Model -> phase -> one sample per round of one start."""
    slowest = 0.0
    for worker in workers.values():
        worker.call("place", inputs.arrays)
        runs = worker.call("turn", inputs.new_tokens, max(1, effort.warmup))
        slowest = max(slowest, *runs[-1].values())
    repeats = min(MOST_REPEATS, math.ceil(TURN_SECONDS / slowest))
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    began, order = time.perf_counter(), list(workers)
    for done in range(1, effort.most + 1):
        for name in order:
            runs = workers[name].call("turn", inputs.new_tokens, repeats)
            for phase in runs[0]:
                samples[name].setdefault(phase, []).append(statistics.median(run[phase] for run in runs))
        order.reverse()
        if done >= effort.least and time.perf_counter() - began > effort.seconds / effort.starts:
            break
    return samples


def _is_decided(found: Mapping[str, _Found], seed: int) -> bool:
    """Whether every phase's ratio can be stated. One model alone needs no more starts."""
    if len(found) < 2:
        return True
    dense, slim = found["dense"].seconds, found["slim"].seconds
    return all(paired_ratio(dense[phase], slim[phase], seed).verdict != TOO_NOISY for phase in slim)


def _most(memory: list[Memory]) -> Memory:
    """Field by field."""
    most: dict[str, int | None] = {}
    for name in (one.name for one in fields(Memory)):
        known = [value for one in memory if (value := getattr(one, name)) is not None]
        most[name] = max(known, default=None)
    return Memory(**most)
