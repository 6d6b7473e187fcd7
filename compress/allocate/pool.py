"""What is allocated from: units with a score and a cost, in the modality and kind they compete in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from slimvlm.compress.errors import InfeasibleBudgetError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
STEP_SHARE = 500  # the same share of BLIP-2's 488,304 units, for models of any size
FINE_FROM = 0.9


@dataclass(frozen=True)
class Pool:
    """The units to choose from; arrays over units are ordered by group, and inside a group by preference among equals.

    Attributes:
        scores: importance, finite and >= 0. [units]
        group: group number of each unit, non-decreasing. [units]
        cost: what is won when a unit leaves (see `costs`), > 0. [units]
        channels: matrix rows a unit holds (1 for an MLP channel, D for a head). [units]
        modality: modality number. [units]
        size: channels of each group in the dense model. [groups]
        floor: fraction of `size` every group keeps (and at least one unit).
        place: parts of a unit's tower that are before its block, and behind it; None: nobody says. [units, 2]
        importance: of each group as a whole, finite and >= 0; None: nobody asked. [groups]
        steps: units per step of a loop, before and after 90 % of the target; None: the allocator's own.
        ratio: the fraction of the model that was asked for, which the target is what is left of.
    """

    scores: Floats
    group: Integers
    cost: Floats
    channels: Integers
    modality: Integers
    size: Integers
    floor: float = 0.1
    place: Floats | None = None
    importance: Floats | None = None
    steps: tuple[int, int] | None = None
    ratio: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError where arrays disagree or a score is no number."""
        lengths = {len(getattr(self, name)) for name in ("scores", "group", "cost", "channels", "modality")}
        if len(lengths) > 1:
            raise ValueError(f"pool: arrays over units have different lengths {sorted(lengths)}")
        if not np.isfinite(self.scores).all() or (self.scores < 0).any():
            raise ValueError("pool: scores must be finite and not negative")
        whole = self.importance
        if whole is not None and (len(whole) != len(self.size) or not (np.isfinite(whole) & (whole >= 0)).all()):
            raise ValueError(f"pool: importance must be {len(self.size)} finite numbers, none below 0, one per group")
        if (np.diff(self.group) < 0).any() or (len(self.group) and self.group[-1] >= len(self.size)):
            raise ValueError(f"pool: units must be ordered by group, with group numbers below {len(self.size)}")

    @property
    def groups(self) -> int:
        return len(self.size)

    @cached_property
    def protected(self) -> Flags:
        """The best units of every group, which the floor keeps: a unit may go if those above it reach the floor."""
        order = np.lexsort((np.arange(len(self.scores)), self.scores, self.group))
        held = np.cumsum(self.channels[order])
        last = np.searchsorted(self.group[order], np.arange(self.groups), side="right") - 1
        above = held[last][self.group[order]] - held  # channels of the better units of the same group
        flags = np.empty(len(order), dtype=bool)
        flags[order] = above < np.maximum(np.ceil(self.floor * self.size - 1e-9), 1)[self.group[order]]
        return flags


@dataclass
class Queue:
    """Units of one modality that may still go, lowest score first; what went is always a prefix."""

    units: Integers
    scores: Floats
    suffix: Floats  # suffix[i] = sum of scores[i:]: exact enough however much has gone, unlike a running difference
    start: int = 0

    @classmethod
    def of(cls, pool: Pool, ordered: Integers) -> Queue:
        scores = pool.scores[ordered]
        return cls(ordered, scores, np.append(np.cumsum(scores[::-1])[::-1], 0.0))

    def __len__(self) -> int:
        return len(self.units) - self.start

    @property
    def total(self) -> float:
        return float(self.suffix[self.start])

    def lowest(self, count: int) -> tuple[Integers, Floats]:
        """The next `count` units and their scores."""
        window = slice(self.start, self.start + count)
        return self.units[window], self.scores[window]


def proportional_steps(units: int) -> tuple[int, int]:
    """Steps that are the same share of `units` as the paper's are of its model's."""
    coarse = max(1, units // STEP_SHARE)
    return coarse, max(1, coarse // 10)


def queues_of(pool: Pool, candidates: Flags) -> list[Queue]:
    """One queue per modality, of its candidate units."""
    order = np.argsort(pool.scores, kind="stable")
    order = order[candidates[order]]
    return [Queue.of(pool, order[pool.modality[order] == modality]) for modality in np.unique(pool.modality)]


def require(reachable: float, target: float, why: str) -> None:
    """Refuse a target that nothing can reach, as InfeasibleBudgetError."""
    if reachable < target:
        raise InfeasibleBudgetError(
            f"cannot remove {int(np.ceil(target)):,} parameters from these groups: {why} allows at most "
            f"{int(reachable):,}; ask for less"
        )
