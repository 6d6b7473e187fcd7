"""Who says which units go: the allocators by name. No torch, no numpy: the code of a row is imported when called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimvlm.compress.allocate.pool import Flags, Integers, Pool


@dataclass(frozen=True)
class Allocator:
    """A row: `(pool, target) -> units`, the numbers of those that go, in the order in which they go.

    Attributes:
        name: how it is called.
        description: what it does, in a line.
        place: file in the folder rules, and function in it.
        floors: it keeps every group's floor. One that does not takes the model as a whole: one ratio for all parts,
            units one by one; a group that it empties keeps its best unit.
        asks: the statistic of whole groups that is `Pool.importance`, seen of the dense model; None: it needs none.
    """

    name: str
    description: str
    place: tuple[str, str]
    floors: bool = True
    asks: str | None = None

    def __call__(self, pool: Pool, target: float) -> Integers:
        file, function = self.place
        units: Integers = getattr(import_module(f"slimvlm.compress.allocate.rules.{file}"), function)(pool, target)
        return units

    def flags(self, pool: Pool, target: float) -> Flags:
        """True for the units that go."""
        import numpy as np

        flags: Flags = np.isin(np.arange(len(pool.scores)), self(pool, target))
        return flags


ALLOCATORS: Mapping[str, Allocator] = {
    row.name: row
    for row in (
        Allocator(
            "balanced", "One ranking; scores count by the mean of their modality.", ("balanced", "order_balanced")
        ),
        Allocator("global", "One ranking of all scores as they are.", ("balanced", "order_global")),
        Allocator("local", "The same share of every group.", ("local", "order_local")),
        Allocator("llm-pruner", "The same, first and last blocks spared.", ("local", "order_llm_pruner")),
        Allocator(
            "paper", "UKMP's loop to the letter: balanced, in whole steps.", ("paper", "order_paper"), floors=False
        ),
        Allocator(
            "ecoflap",
            "Of each group by what changes of it do to the loss.",
            ("ecoflap", "order_ecoflap"),
            asks="zeroth-order",
        ),
        Allocator("ecoflap-first", "The same by gradients.", ("ecoflap", "order_ecoflap"), asks="first-order"),
    )
}
