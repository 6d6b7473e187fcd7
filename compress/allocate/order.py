"""The order in which units left: with it one calibration gives the plan of every ratio up to its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from slimvlm.compress.allocate.pool import Integers
from slimvlm.compress.errors import CheckpointError, SlimvlmError, UnsuitableOptionError
from slimvlm.compress.files.decoding import MisfitError, content_of, decode, dump, parse, refused_as
from slimvlm.compress.files.writing import load_tensors, save_tensors
from slimvlm.compress.plan import BLOCK, Plan, TowerCount

LEFT = "left/"  # begins the names of the tensors that say when the indices of a group left


@dataclass(frozen=True)
class Header:
    """What an order's file holds besides its arrays. `digest`: of all of it, so that no other file passes for one."""

    plan: Plan
    rounds: tuple[int, ...]
    digest: str


@dataclass(frozen=True, eq=False)
class Order:
    """When which units left. One step takes what leaves together: a unit, or a bundle of them.

    Attributes:
        plan: what is left after the last step.
        left: group key -> the step, from 0, with which each index left; -1: it stays. int64 [size]
        parameters, macs: what left the towers (sorted by name) with each step. int64 [steps, towers]
        rounds: steps that were done after each round.

    Raises:
        ValueError: these contradict each other.
    """

    plan: Plan
    left: Mapping[str, Integers]
    parameters: Integers
    macs: Integers
    rounds: tuple[int, ...]

    def __post_init__(self) -> None:
        plan, steps = self.plan, self.rounds[-1] if self.rounds else 0
        if list(self.rounds) != sorted(self.rounds) or not self.rounds or self.rounds[0] < 0:
            raise ValueError(f"order: rounds {self.rounds} do not end one after the other")
        for name, table in (("parameters", self.parameters), ("macs", self.macs)):
            if table.shape != (steps, len(plan.towers)) or (table < 0).any():
                raise ValueError(f"order: {name} must be {steps} steps of {len(plan.towers)} towers, none below 0")
        if {key: len(left) for key, left in self.left.items()} != dict(plan.sizes):
            raise ValueError("order: the groups of the plan are others")
        taken = np.unique(np.concatenate([*self.left.values(), [-1]]))
        if not np.array_equal(taken, np.arange(-1, steps)):
            raise ValueError(f"order: not every one of {steps} steps takes a unit, or a unit leaves with none of them")
        if other := [key for key, left in self.left.items() if _kept(left, steps) != plan.keep[key]]:
            raise ValueError(f"order: the plan keeps others in group {other[0]}")
        if plan.parameters_after + plan.dropped_parameters + self.parameters.sum() != plan.parameters_before:
            raise ValueError("order: what leaves with its steps is not what the plan removes")

    @property
    def steps(self) -> int:
        return len(self.parameters)

    def compose(self, later: Order) -> Order:
        """This order and then `later`, whose indices count what this one left.

        Raises:
            ValueError: `later` was not made for the model this one gives, or takes whole blocks with what is inside.
        """
        plan = self.plan.compose(later.plan)
        left = {key: steps.copy() for key, steps in self.left.items()}
        for name, key in self.plan.called(later.plan).items():
            steps = left.setdefault(name, np.full(plan.sizes[name], -1))
            kept = self.plan.keep.get(name, range(plan.sizes[name]))
            steps[list(kept)] = np.where(later.left[key] < 0, -1, later.left[key] + self.steps)
        return Order(
            plan,
            left,
            np.concatenate([self.parameters, later.parameters]),
            np.concatenate([self.macs, later.macs]),
            (*self.rounds, *(self.steps + count for count in later.rounds)),
        )

    def plan_at(self, ratio: float) -> Plan:
        """The plan that removes `ratio` of all parameters, within half a step: the first steps of this order. What it
        keeps contains what the plan of any larger ratio keeps; at the order's own ratio it is the order's plan.

        Raises:
            UnsuitableOptionError: the order does not go so far.
        """
        plan = self.plan
        if not 0 <= ratio <= plan.ratio:
            raise UnsuitableOptionError(
                f"ratio {ratio:g} is not within the {plan.ratio:g} this plan was made for; ask for at most that, or "
                f"make a plan with --ratio {ratio:g}"
            )
        if ratio == plan.ratio:
            return plan
        gone = np.concatenate([[0], self.parameters.sum(1).cumsum()]) + plan.dropped_parameters
        steps = int(np.abs(gone - ratio * plan.parameters_before).argmin())
        return replace(self.plan_after(steps), ratio=ratio, prefix_of=plan.ratio)

    def plan_after(self, steps: int) -> Plan:
        """What is left after so many steps; the plan's ratio is that of all of them."""
        plan = self.plan
        keep = {key: _kept(left, steps) for key, left in self.left.items()}
        if any(keep[f"{tower}.{BLOCK}"] != kept for tower, kept in plan.blocks.items()):
            # Widths are only known of the blocks that stay in the end, and none is cut before the others left.
            keep = {key: kept for key, kept in keep.items() if key.endswith(f".{BLOCK}")}
        parameters, macs = (table[steps:].sum(0).tolist() for table in (self.parameters, self.macs))  # that come back
        towers = {
            name: _more(plan.towers[name], parameters[column], macs[column])
            for column, name in enumerate(sorted(plan.towers))
        }
        return replace(
            plan,
            parameters_after=plan.parameters_after + sum(parameters),
            towers=towers,
            sizes={key: plan.sizes[key] for key in keep},
            keep=keep,
            rescued=tuple(key for key in plan.rescued if keep.get(key) == plan.keep[key]),
        )

    def beginning(self, ratio: float, whole: int) -> Order:
        """Its first steps, as many as remove at most `ratio` of a model that had `whole` parameters when dense."""
        plan = self.plan
        present = plan.parameters_before - plan.dropped_parameters - self.parameters.sum(1).cumsum()
        steps = int((present >= (1 - ratio) * whole).sum())
        left = {key: np.where(gone < steps, gone, -1) for key, gone in self.left.items()}
        shorter = replace(self.plan_after(steps), ratio=ratio)
        return Order(shorter, left, self.parameters[:steps], self.macs[:steps], (steps,))

    def save(self, path: Path) -> None:
        """Write one safetensors file; a reader never sees half of it.

        Raises:
            OutputError: it cannot be written.
        """
        from torch import from_numpy

        header = asdict(Header(self.plan, self.rounds, self.digest))
        # One fact: of several, safetensors writes now this one first, now that.
        save_tensors(path, {name: from_numpy(array) for name, array in self._arrays().items()}, {"order": header})

    @classmethod
    def read(
        cls, path: Path, error: type[SlimvlmError] = CheckpointError, advice: str = "make the plan again"
    ) -> Order:
        """The order that `save` wrote.

        Raises:
            SlimvlmError: of the class `error`, naming the file: it is missing, damaged, or was changed.
        """
        with refused_as(path, error, advice):
            content_of(path)  # of a regular file
            tensors, facts = load_tensors(path)
            header = decode(facts.get("order"), Header, "order")
            arrays = {name: tensor.long().numpy() for name, tensor in tensors.items()}
            if missing := {"parameters", "macs"} - arrays.keys():
                raise MisfitError(f"there are no {min(missing)}")
            tables = arrays.pop("parameters"), arrays.pop("macs")
            left = {name.removeprefix(LEFT): array for name, array in arrays.items()}
            order = cls(header.plan, left, *tables, header.rounds)
            if header.digest != order.digest:
                raise MisfitError("it was changed since it was written (its digest differs)")
            return order

    @property
    def digest(self) -> str:
        """Of all that is in it."""
        found = hashlib.sha256(dump([parse(self.plan.to_json()), self.rounds], sort_keys=True).encode())
        for name, array in sorted(self._arrays().items()):
            found.update(name.encode())
            found.update(array.tobytes())
        return found.hexdigest()

    def _arrays(self) -> dict[str, Integers]:
        left = {f"{LEFT}{key}": steps for key, steps in self.left.items()}
        return {**left, "parameters": self.parameters, "macs": self.macs}


def _kept(left: Integers, steps: int) -> tuple[int, ...]:
    """The indices that are there after so many steps."""
    return tuple(np.flatnonzero((left < 0) | (left >= steps)).tolist())


def _more(count: TowerCount, parameters: int, macs: int) -> TowerCount:
    """The tower with so much less gone."""
    return replace(count, parameters_after=count.parameters_after + parameters, macs_after=count.macs_after + macs)
