"""How a long job tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What every long job calls: the stage, how much of it is done, and what else is worth saying; of a stage that has
    several parts, or comes several times, in which it is: `part`.
    """

    def __call__(self, stage: str, done: int, total: int, note: str = "", /) -> None:
        """Show it."""


def part(number: int, of: int) -> str:
    """The note for a part of a stage, counted from 1."""
    return f"round {number} of {of}"


def silent(stage: str, done: int, total: int, note: str = "", /) -> None:
    """The progress that nobody watches."""
