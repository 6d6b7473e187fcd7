"""What a stock layout takes from where: whole blocks first, and how much of each tower; tried before it is planned.

The unmodified class builds no other number of heads in many towers, and in others one number for all layers, so widths
alone take much from where little is to spare, and scores of single units do not say what it does to take as many from
every layer. Blocks are what it always builds. Every block is switched off by itself on some of the calibration samples,
as in SLEB (Song et al., ICML 2024), which says what a tower can spare; how far a block turns its tokens does not. Then
the cut of the whole ratio is tried, refitted: with one block more of a tower, and other shares of the towers, as long
as the loss gets clearly lower.

Cost, in forward passes over `LOOKED_AT` batches: one a block; for every set of blocks that is tried a calibration, a
refit, and one for each share. All is tried in the dense model, with zeros where something leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any  # linears, and those of experts taken apart

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.compress.allocate.budget import Budget, order_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import Scores, score_groups
from slimvlm.compress.errors import InfeasibleBudgetError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import Group, find_blocks
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.plan import BLOCK
from slimvlm.compress.progress import Progress
from slimvlm.compress.rounds import Planning, agreed, score_units
from slimvlm.compress.slicing.cuts import complement
from slimvlm.compress.slicing.guard import CLEARLY, LOOKED_AT, Weights, in_place, loss_with, opened, refitted
from slimvlm.compress.slicing.mask import switched_off
from slimvlm.compress.slicing.refit import Batches as Work
from slimvlm.compress.statistics.reading import Batches

STEPS = 8  # blocks leave a tower in so many steps, or one by one
PARTS = (0.2, 0.4, 0.6, 0.8)  # of what the widths of a tower can give
Gone = Mapping[str, int]  # tower -> how many of its blocks leave


def tries_shapes(planning: Planning) -> bool:
    """Whether blocks leave, and towers share the ratio, as the loss says; else as the options do."""
    budget, blocks = planning.budget, planning.criterion.units == BLOCK
    return budget.layout == "stock" and not (planning.depth or blocks or budget.kind_ratio or budget.times)


def with_stock_shape(
    model: PreTrainedModel, batches: Batches, planning: Planning, done: Order | None, progress: Progress
) -> Planning:
    """`planning` with the blocks that leave first, and with what towers give, by the dense `model`, which is left as it
    is; the same where it is for another layout, or says itself which blocks leave, and of a model that is streamed.

    Args:
        batches: of the calibration, with answers.
        done: the rounds of an interrupted run, which knew.
    """
    if not tries_shapes(planning) or streamed(model):
        return planning
    if done is not None:
        said = done.plan.options
        budget = replace(planning.budget, tower_ratio=said["tower_ratio"])
        return replace(planning, depth=said.get("depth_ratio", {}), budget=budget)
    trials = _Trials(model, planning, [partial(opened, batch) for batch in batches[:LOOKED_AT]], progress)
    best = trials.best({})
    while more := trials.more(best.gone):
        other = min((trials.best(gone) for gone in more), key=lambda shape: shape.loss)
        if not other.loss < CLEARLY * best.loss:
            break
        best = other
    budget = replace(planning.budget, tower_ratio={**best.towers, **planning.budget.tower_ratio})
    return replace(planning, depth=trials.shares(best.gone), worth=trials.worth, budget=budget)


@dataclass(frozen=True)
class _Shape:
    """A cut for the whole ratio: the blocks that leave, towers with a ratio that was chosen, the loss of a sample."""

    gone: Gone
    towers: Mapping[str, float]
    loss: float


class _Trials:
    """Cuts of the dense `model` for the whole ratio of `planning`, on the samples `work`.

    Attributes:
        worth: of every block: the loss without it.
    """

    def __init__(self, model: PreTrainedModel, planning: Planning, work: Work, progress: Progress) -> None:
        self.model, self.planning, self.work, self.progress = model, planning, work, progress
        self.family = find_family(model.config)
        self.groups = planning.groups(model)
        self.facts = facts_of(model, self.groups)
        self.blocks = find_blocks(model, self.family)
        self.worth = self._alone()
        self._tried = 0

    def more(self, gone: Gone) -> list[Gone]:
        """The same with a step more of one tower, for every tower that has something to give; not beyond a ratio."""
        found: list[Gone] = []
        for group in self.blocks:
            count = gone.get(group.tower, 0) + max(1, len(group.blocks) // STEPS)
            stay = max(1, math.ceil(self.planning.budget.floor * group.size))
            one = {**gone, group.tower: count}
            if count <= len(group.blocks) - stay and self._fits(one):
                found.append(one)
        return found

    def shares(self, gone: Gone) -> dict[str, float]:
        """Tower -> the fraction of its parameters that leaves with its blocks."""
        lost = {
            group.tower: sum(group.blocks[unit].parameters for unit in self._spared(group, gone))
            for group in self.blocks
        }
        return {tower: lost[tower] / self.facts.towers[tower] for tower in gone}

    def best(self, gone: Gone) -> _Shape:
        """Without these blocks, with the shares of towers that lose least."""
        left = {group.key: self._spared(group, gone) for group in self.blocks}
        numbers = {group.tower: {group.blocks[unit].index for unit in left[group.key]} for group in self.blocks}
        groups = [group for group in self.groups if group.layer not in numbers.get(group.tower, ())]
        off, held = self._off(left), dict[str, Tensor]()
        with in_place(self.model, off):
            scores = agreed(score_units(self.model, groups, lambda: self.work, self.planning))

        def loss(towers: Mapping[str, float]) -> float:
            try:
                keep = order_units(groups, scores, self._rest(gone, towers), self.facts).plan.keep
            except InfeasibleBudgetError:
                return math.inf
            with in_place(self.model, off):
                fitted = refitted(self.model, self.family, groups, keep, self.work, held)
            return loss_with(self.model, self.family, {**off, **fitted}, self.work)

        best = _Shape(gone, {}, loss({}))
        for tower, ratios in self._ratios(groups, gone).items():
            tries = [{**best.towers, tower: ratio} for ratio in ratios]
            losses = [loss(towers) for towers in tries]
            if min(losses) < CLEARLY * best.loss:
                best = _Shape(gone, tries[losses.index(min(losses))], min(losses))
        self._tried += 1
        self.progress("shapes", self._tried, self._tried)
        return best

    def _ratios(self, groups: Sequence[Group], gone: Gone) -> dict[str, list[float]]:
        """For all towers but the largest: ratios that they may have, blocks and widths together."""
        widths: dict[str, int] = {}
        for group in groups:
            if group.part.fields:
                widths[group.tower] = widths.get(group.tower, 0) + int(group.parameters.sum())
        shares, floor, given = self.shares(gone), self.planning.budget.floor, self.planning.budget.tower_ratio
        others = sorted(widths, key=self.facts.towers.__getitem__)[:-1]
        parts = {tower: (1 - floor) * widths[tower] / self.facts.towers[tower] for tower in others}
        return {
            tower: [shares.get(tower, 0.0) + part * parts[tower] for part in PARTS]
            for tower in others
            if tower not in given
        }

    def _alone(self) -> Scores:
        values = {group.key: torch.zeros(len(group.blocks)) for group in self.blocks}
        for group in self.blocks:
            for unit in range(len(group.blocks)):
                off = self._off({group.key: [unit]})
                values[group.key][unit] = loss_with(self.model, self.family, off, self.work)
                self.progress(f"without a block of {group.tower}", unit + 1, len(group.blocks))
        return agreed(replace(score_groups(self.blocks, CRITERIA["random"]), values=values))

    def _fits(self, gone: Gone) -> bool:
        budget, free = self.planning.budget, sum(one.parameters for one in self.facts.dead.values())
        shares = self.shares(gone)
        within = all(share <= budget.tower_ratio.get(tower, 1) for tower, share in shares.items())
        return within and self._whole(shares) + free / self.facts.parameters <= budget.ratio

    def _whole(self, shares: Mapping[str, float]) -> float:
        """The fraction of all parameters that leaves with such shares of towers."""
        return sum(share * self.facts.towers[tower] for tower, share in shares.items()) / self.facts.parameters

    def _spared(self, group: Group, gone: Gone) -> list[int]:
        """The units of the blocks that leave: those without which the loss is least."""
        return self.worth.values[group.key].argsort(stable=True)[: gone.get(group.tower, 0)].tolist()

    def _off(self, left: Mapping[str, Sequence[int]]) -> Weights:
        """Zeros for the projections through which blocks (units by group) add to the residual stream."""
        zeros: dict[str, tuple[Tensor, Tensor | None]] = {}
        for group in self.blocks:
            gone = [group.blocks[unit].index for unit in left.get(group.key, ())]
            kept = complement(torch.tensor(gone, dtype=torch.int64), group.size)
            for cut in switched_off(self.model, group, kept):
                module: Any = self.model.get_submodule(cut.path)
                bias = None if module.bias is None else torch.zeros_like(module.bias)
                zeros[cut.path] = torch.zeros_like(module.weight), bias
        return zeros

    def _rest(self, gone: Gone, towers: Mapping[str, float]) -> Budget:
        """What widths have to give besides."""
        budget, shares = self.planning.budget, self.shares(gone)
        ratios = {**towers, **budget.tower_ratio}
        ratios = {tower: ratio - shares.get(tower, 0.0) for tower, ratio in ratios.items()}
        allocator = budget.allocator if self.planning.asks is None else "global"
        return replace(budget, ratio=budget.ratio - self._whole(shares), tower_ratio=ratios, allocator=allocator)
