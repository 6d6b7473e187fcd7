"""What every backend can do, and the one loop that times it: vision, prefill, one token after the other.

The loop takes as many tokens as asked, also past the end of an answer: two models must do the same work to be compared.
Nothing is waited for inside it; on a GPU the marks are events, read when everything is done.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slimvlm.export.running.generation import Arrays
from slimvlm.export.running.runners import Value

Mark = Any  # what a clock shows: the host's seconds, or an event in the stream of a GPU


class Generating(Protocol):
    """A model that answers; `step` continues what `prefill` began."""

    def vision(self) -> Value:
        """Features of the images, as `prefill` takes them; None without images."""

    def prefill(self, features: Value, new_tokens: int) -> Value:
        """First logits [B, V], a tensor or an array, and a cache that is good for `new_tokens` more."""

    def step(self, token: Value) -> Value:
        """Logits [B, V] after one more `token` [B, 1]: what `argmax` of the logits before gave."""


class Backend(Generating, Protocol):
    """A loaded model on a device; `place` comes first."""

    def place(self, arrays: Arrays) -> None:
        """Take the inputs of a workload: `input_ids` [B, S], `attention_mask`, and what the processor made of images;
        without images only the language model is run.
        """

    def text(self) -> Value:
        """Embedding of the text (dual encoders)."""


class Clock(Protocol):
    """Tells when work was done."""

    def mark(self) -> Mark:
        """Now: behind all work that was asked for so far."""

    def seconds(self, marks: Sequence[Mark]) -> list[float]:
        """Since the first mark."""


class HostClock:
    """Marks of a device that has done its work when a call returns."""

    mark = staticmethod(time.perf_counter)

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """See `Clock`."""
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """Marks in the stream of one GPU; they are read when all work before the last one is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """See `Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """See `Clock`."""
        torch.cuda.synchronize(self.device)
        return [marks[0].elapsed_time(mark) / 1000 for mark in marks]


def clock_of(device: torch.device) -> Clock:
    """The clock that a device's work is timed with."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds per phase (see `profile.PHASES`), and the tokens [B, T] that were generated."""

    seconds: dict[str, float]
    tokens: Tensor


@torch.inference_mode()
def time_generation(backend: Generating, clock: Clock, new_tokens: int, images: bool = True) -> Timed:
    """One generation of `new_tokens`, and when it got where.

    Args:
        images: False times the language model alone, without the phase `vision`.
    """
    mark = clock.mark
    marks = [mark()]
    features = backend.vision() if images else None
    marks.append(mark())
    logits = backend.prefill(features, new_tokens)
    marks.append(mark())
    tokens = [logits.argmax(-1, keepdims=True)]  # numpy's name of it, which torch knows too
    marks.append(mark())
    for _ in range(new_tokens - 1):
        tokens.append(backend.step(tokens[-1]).argmax(-1, keepdims=True))
    marks.append(mark())
    _, vision, prefill, first, last = clock.seconds(marks)
    seconds = {"vision": vision} if images else {}
    seconds |= {"prefill": prefill - vision, "ttft": first, "end_to_end": last}
    if new_tokens > 1:
        seconds["tpot"] = (last - first) / (new_tokens - 1)
    return Timed(seconds, torch.cat([torch.as_tensor(token) for token in tokens], dim=1))


@torch.inference_mode()
def time_embedding(backend: Backend, clock: Clock) -> dict[str, float]:
    """Seconds of both sides of a dual encoder, one after the other."""
    marks = [clock.mark()]
    for side in (backend.vision, backend.text):
        side()
        marks.append(clock.mark())
    _, vision, text = clock.seconds(marks)
    return {"vision": vision, "text": text - vision}
