"""Cells, measured: the dense and the slim model take turns, each in a process of its own, until it is decided.

A turn of a small model holds several runs and gives their median, so that what a switch of processes costs (cold
caches) does not count. Which model goes first changes every round, so that a drift of the clock favours neither.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from slimvlm.serve.bench import Source
from slimvlm.serve.profile import MEASURED, TOO_NOISY, Cell, DecoderTest, Ratio, Run
from slimvlm.serve.statistics import MIN_ROUNDS, decoder_test, paired_ratio, summarize_cell
from slimvlm.serve.worker import Worker, WorkerLostError
from slimvlm.serve.workload import Inputs

TURN_SECONDS, MOST_REPEATS = 0.05, 20  # so long a turn is to be; so many runs it may hold
CHECKED_EVERY = 2 * MIN_ROUNDS  # rounds; asking after each would find a difference by chance sooner or later
ENERGY_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a cell is measured.

    Attributes:
        warmup: runs of each model before the first round.
        rounds: at most so many.
        seconds: no further round is begun after so many, if there were enough for a statement.
        seed: of the bootstrap.
    """

    warmup: int
    rounds: int
    seconds: float
    seed: int


def measure_cell(sources: Mapping[str, Source], inputs: Inputs, effort: Effort) -> Cell:
    """One workload on one backend.

    Args:
        sources: `slim`, or `dense` and `slim`, of one backend.

    Raises:
        SlimvlmError: a model was refused; what a process dies of is in the cell instead.
    """
    first = next(iter(sources.values()))
    cell = Cell(
        first.backend, first.dtype, inputs.rows, inputs.image_size, inputs.prompt_tokens, inputs.new_tokens, MEASURED
    )
    try:
        dtype, runs = _measure_runs(sources, inputs, effort)
        return summarize_cell(replace(cell, dtype=dtype, runs=runs), effort.seed)
    except WorkerLostError as lost:
        cell = replace(cell, status=lost.status, reason=str(lost))
        if lost.model != "dense":
            return cell
        # What the dense model cannot do at all the slim one may do: that is worth knowing.
        alone = measure_cell({"slim": sources["slim"]}, inputs, effort)
        return replace(cell, dtype=alone.dtype, runs=alone.runs)


def _measure_runs(sources: Mapping[str, Source], inputs: Inputs, effort: Effort) -> tuple[str, dict[str, Run]]:
    """The slim model's dtype, and what each model did."""
    with ExitStack() as stack:
        workers = _start(stack, sources)
        loads = {name: worker.call("load") for name, worker in workers.items()}
        samples = _take_turns(workers, inputs, effort)
        runs = {}
        for name, worker in workers.items():
            energy = worker.call("joules_per_token", inputs.new_tokens, inputs.rows, ENERGY_SECONDS)
            memory = worker.call("memory")
            seconds = {phase: tuple(found) for phase, found in samples[name].items()}
            runs[name] = Run(seconds, (loads[name]["seconds"],), memory, energy)
        return loads["slim"]["dtype"], runs


def measure_decoder(
    sources: Mapping[str, Source], tests: Mapping[str, tuple[Inputs, str, int]], effort: Effort
) -> list[DecoderTest]:
    """The language model alone; the tests share their processes.

    Args:
        tests: name -> inputs, the phase whose seconds count, and for how many tokens.
    """
    first, done = next(iter(sources.values())), []
    try:
        with ExitStack() as stack:
            workers = _start(stack, sources)
            dtype = {name: worker.call("load")["dtype"] for name, worker in workers.items()}["slim"]
            for name, (inputs, phase, tokens) in tests.items():
                samples = _take_turns(workers, inputs, effort)
                count = tokens if phase == "prefill" else 1
                rates = {model: [count / seconds for seconds in found[phase]] for model, found in samples.items()}
                done.append(decoder_test((first.backend, dtype, name), tokens, rates, effort.seed))
    except WorkerLostError as lost:
        missing = list(tests)[len(done) :]
        what = first.backend, first.dtype
        done += [DecoderTest(*what, name, tests[name][2], lost.status, str(lost)) for name in missing]
    return done


def _start(stack: ExitStack, sources: Mapping[str, Source]) -> dict[str, Worker]:
    return {name: stack.enter_context(Worker(name, source)) for name, source in sources.items()}


def _take_turns(workers: Mapping[str, Worker], inputs: Inputs, effort: Effort) -> dict[str, dict[str, list[float]]]:
    """Model -> phase -> one sample per round."""
    slowest = 0.0
    for worker in workers.values():
        worker.call("place", inputs.arrays)
        runs = worker.call("turn", inputs.new_tokens, max(1, effort.warmup))
        slowest = max(slowest, *runs[-1].values())
    repeats = min(MOST_REPEATS, math.ceil(TURN_SECONDS / slowest))
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    started, order = time.perf_counter(), list(workers)
    for done in range(1, effort.rounds + 1):
        for name in order:
            runs = workers[name].call("turn", inputs.new_tokens, repeats)
            for phase in runs[0]:
                samples[name].setdefault(phase, []).append(statistics.median(run[phase] for run in runs))
        order.reverse()
        if done >= MIN_ROUNDS and time.perf_counter() - started > effort.seconds:
            break
        if done % CHECKED_EVERY == 0 and _is_decided(samples, effort.seed):
            break
    return samples


def _is_decided(samples: Mapping[str, Mapping[str, list[float]]], seed: int) -> bool:
    """Whether every phase's ratio can be stated. One model alone needs no more rounds."""
    if len(samples) < 2:
        return True
    dense, slim = samples["dense"], samples["slim"]
    ratios: list[Ratio] = [paired_ratio(dense[phase], slim[phase], seed) for phase in slim]
    return all(ratio.verdict != TOO_NOISY for ratio in ratios)
