"""What the timed loop reads off the clock, without a clock."""

from __future__ import annotations

import pytest
import torch

from slimvlm.serve.backends.backend import time_embedding, time_generation


class Counter:
    """A clock that shows how often it was read."""

    def __init__(self):
        self.read = 0

    def mark(self):
        self.read += 1
        return self.read

    def seconds(self, marks):
        return [float(mark - marks[0]) for mark in marks]


class Work:
    """A backend that moves the clock on: 10 for vision, 100 for the prompt, 1 for every later token."""

    def __init__(self, clock):
        self.clock = clock

    def _take(self, time):
        self.clock.read += time
        return torch.zeros(2, 5).index_fill(1, torch.tensor([3]), 1.0)

    def vision(self):
        return self._take(10)

    def prefill(self, features, new_tokens):
        return self._take(100)

    def step(self, token):
        assert token.tolist() == [[3], [3]]
        return self._take(1)

    def text(self):
        return self._take(1000)


@pytest.mark.parametrize("new_tokens", (1, 2, 50))
def test_the_clock_is_read_as_often_whatever_the_number_of_tokens(new_tokens):
    clock = Counter()
    timed = time_generation(Work(clock), clock, new_tokens)
    assert clock.read - (110 + new_tokens - 1) == 5
    assert timed.tokens.tolist() == 2 * [new_tokens * [3]]


def test_phases_are_what_lies_between_the_marks():
    clock = Counter()
    seconds = time_generation(Work(clock), clock, 5).seconds
    assert seconds == {"vision": 11, "prefill": 101, "ttft": 113, "tpot": 5 / 4, "end_to_end": 118}


def test_one_token_has_no_later_ones_and_text_alone_no_vision():
    clock = Counter()
    assert set(time_generation(Work(clock), clock, 1, images=False).seconds) == {"prefill", "ttft", "end_to_end"}


def test_the_sides_of_a_dual_encoder_are_timed_apart():
    clock = Counter()
    assert time_embedding(Work(clock), clock) == {"vision": 11, "text": 1001}
