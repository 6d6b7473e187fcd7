"""Which weights of a matrix become zero: the local rules by name, and the patterns of zeros. Read without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any  # of torch, which is not imported here

PATTERNS: Mapping[str, tuple[int, int] | None] = {"unstructured": None, "2:4": (2, 4)}  # zeros, of neighbours in a row
RECORD = "slimvlm_sparsity"  # of a config: what was done, see `Sparsified`


@dataclass(frozen=True)
class Zeros:
    """How many weights of a matrix become zero: `count` in every `of` neighbours of a row, or of whole rows (None)."""

    count: int
    of: int | None = None


@dataclass(frozen=True)
class Rule:
    """A row: `prune(weight, seen, zeros) -> weight`, fp32 in and out, [out, in].

    Attributes:
        statistic: of STATISTICS; `seen` is what it has of the linear's input.
        file: of this folder.
    """

    name: str
    description: str
    statistic: str
    file: str

    @property
    def prune(self) -> Callable[[Any, Any, Zeros], Any]:
        """The function of the row, of tensors."""
        made: Callable[[Any, Any, Zeros], Any] = import_module(f"slimvlm.compress.sparsity.{self.file}").prune
        return made


RULES: Mapping[str, Rule] = {
    row.name: row
    for row in (
        Rule("wanda", "The smallest |w| |x| of every row.", "input-norms", "wanda"),
        Rule("sparsegpt", "What the others can make up for, which they then do.", "moments", "sparsegpt"),
    )
}
