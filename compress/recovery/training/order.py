"""The order of the data: which samples make the batch of a step, and which of them each process takes.

Batches keep their composition during the whole training (what a teacher said about a batch can be used again); only
their order changes from epoch to epoch. Everything follows from the seed and the number of the step, so a resumed
training goes on with the very batch it would have had.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The samples of optimiser step `step` (counted from 0), over all processes.

    Every epoch shows every sample. Where the samples do not divide into batches, the last batch is filled up with
    samples of the first one, so that all batches are equally large; with fewer samples than `batch_size` the only batch
    holds each of them once.

    Args:
        count: samples there are.

    Raises:
        ValueError: `count` or `batch_size` is not positive, or `step` is negative.
    """
    if count < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"no batch {step} of {batch_size} out of {count} samples: count and size must be positive")
    batches = _batches(count, batch_size, seed)
    epoch, position = divmod(step, len(batches))
    return list(batches[_order(len(batches), seed, epoch)[position]])


def divide(indices: Sequence[int], parts: int) -> list[list[int]]:
    """Contiguous parts whose sizes differ by one at most, the larger ones first; empty ones if there are too few."""
    size, larger = divmod(len(indices), parts)
    starts = [number * size + min(number, larger) for number in range(parts + 1)]
    return [list(indices[first:last]) for first, last in pairwise(starts)]


@lru_cache(maxsize=8)
def _batches(count: int, batch_size: int, seed: int) -> tuple[tuple[int, ...], ...]:
    samples = list(range(count))
    random.Random(f"batches {seed}").shuffle(samples)
    if count > batch_size:
        samples += samples[: -count % batch_size]
    return tuple(tuple(samples[first : first + batch_size]) for first in range(0, len(samples), batch_size))


@lru_cache(maxsize=8)
def _order(batches: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(batches))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)
