"""Plan in rounds: calibrate, score and cut a little, then look again at the model that is left.

Scores of a dense model say little about a half-cut one. The ratio grows as target * (1 - (1 - i/R)^1.5): large steps
while the model is whole, small ones near the end. One round is the paper's one-shot plan. Equal steps (a power of 1)
are for an order whose beginnings are wanted without a refit: its early rounds see more of the model. Between rounds the
model may be compensated, so that the next one looks at what a model cut so far is worth when all is done. Before the
first one whole blocks may leave (depth, then width: VLMCompression, IJCV 2026).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from slimvlm.compress import processes
from slimvlm.compress.allocate.allocators import ALLOCATORS
from slimvlm.compress.allocate.budget import Budget, order_units
from slimvlm.compress.allocate.facts import Facts, facts_of
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.criteria.criterion import CRITERIA, Criterion
from slimvlm.compress.criteria.scoring import Scores, score_groups
from slimvlm.compress.errors import InfeasibleBudgetError, UnsuitableOptionError
from slimvlm.compress.models.computing import give_back_memory
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import Group, find_blocks, find_units
from slimvlm.compress.plan import BLOCK, Plan
from slimvlm.compress.progress import Progress, part, silent
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.slicing.cuts import matching_groups
from slimvlm.compress.slicing.depth import place
from slimvlm.compress.slicing.guard import guarded
from slimvlm.compress.statistics.collect import collect, importance_of
from slimvlm.compress.statistics.reading import Batches
from slimvlm.compress.statistics.rows import ALL, CalibrationOptions

Value = TypeVar("Value")


@dataclass(frozen=True)
class Planning:
    """How a plan is made.

    Attributes:
        budget: on the dense model.
        criterion: what a unit is worth.
        grad_memory_bytes, host_sums: bounds on the memory of each calibration.
        rounds: calibrations, each on the model as cut so far; one, where the allocator has no floors: it may overshoot
            what is left to remove later.
        power: how much larger the first rounds' steps are than the last ones'; 1: all are equal.
        depth: tower -> fraction of its parameters that leaves as whole blocks, by their influence, before the rounds.
        between: one of COMPENSATIONS, done to the model after every round but the last.
        guard: a round is tried before it is taken, see `guard.guarded`.
        known: the scores of the dense model, of an earlier plan: the first round takes them and reads no data.
        until: the budget is that of all rounds, and this one ends where so much of the dense model has left. Where
            steps are coarse, the fine ones that the last round needs would otherwise have left before.
        worth: what blocks are worth, where it is not their influence: those of `depth` leave by it.

    Raises:
        UnsuitableOptionError: more rounds than the allocator can make, or what excludes blocks that leave first.
    """

    budget: Budget
    criterion: Criterion
    grad_memory_bytes: int | None = None
    host_sums: bool = False
    rounds: int = 1
    power: float = 1.5
    depth: Mapping[str, float] = field(default_factory=dict)
    between: str = "none"
    guard: bool = False
    attention_unit: str = "auto"
    seed: int = 0
    known: Scores | None = None
    until: float | None = None
    worth: Scores | None = None

    def __post_init__(self) -> None:
        allocator = ALLOCATORS[self.budget.allocator]
        if self.rounds > 1 and not allocator.floors:
            raise UnsuitableOptionError(
                f"the allocator {allocator.name} takes all in one round, not in {self.rounds}; give --rounds 1"
            )
        if not self.depth:
            return
        if not allocator.floors or self.criterion.units == BLOCK or self.budget.kind_ratio or self.budget.times:
            raise UnsuitableOptionError(
                "--depth-ratio takes whole blocks before the widths of the others are chosen; leave it out, or the "
                "criterion influence, the allocator paper, --kind-ratio and --cost milliseconds"
            )

    @property
    def steps(self) -> int:
        """Readings of the data: the rounds, and before them one for whole blocks."""
        return self.rounds + bool(self.depth)

    def step(self, number: int, dense: Facts, begun: Plan | None) -> Planning:
        """Step `number`, from 1, as a plan in one round.

        Args:
            dense: of the dense model.
            begun: the blocks that left first, once they did.
        """
        if self.depth and begun is None:
            towers = {**dict.fromkeys(dense.towers, 0.0), **self.depth}
            whole = sum(share * dense.towers.get(tower, 0) for tower, share in towers.items()) / dense.parameters
            budget = Budget(whole, towers, allocator="global", layout=self.budget.layout)
            tokens = self.criterion.tokens if self.criterion.tokens.pool != ALL.pool else ALL
            influence = replace(CRITERIA["influence"], tokens=tokens)
            return replace(self, budget=budget, criterion=influence, rounds=1, depth={}, guard=False, known=self.worth)
        share = round_share(number - bool(self.depth), self.rounds, self.power)
        known = self.known if number == 1 else None
        budget, until = self.budget.scaled(share, begun), None
        if budget.layout == "stock" and number < self.steps:
            budget, until = self.budget, budget.ratio
        return replace(self, budget=budget, rounds=1, depth={}, known=known, until=until)

    def besides(self) -> dict[str, object]:
        """What a plan says of its making that neither its criterion nor its budget knows."""
        towers = dict(self.budget.tower_ratio)  # of all steps, where the first has others
        depth = {"depth_ratio": dict(self.depth), "tower_ratio": towers} if self.depth else {}
        guard = {"guard": True} if self.guard else {}
        return {**depth, **({"between": self.between} if COMPENSATIONS[self.between].place else {}), **guard}

    def begun(self, order: Order | None) -> Plan | None:
        """What the blocks that leave first have left of the dense model, once they did."""
        return order.plan_after(order.rounds[0]) if self.depth and order is not None else None

    @property
    def calibration(self) -> CalibrationOptions:
        """What each calibration collects."""
        return self.criterion.calibration(grad_memory_bytes=self.grad_memory_bytes, host_sums=self.host_sums)

    @property
    def asks(self) -> CalibrationOptions | None:
        """What the allocator asks of the data, once, of the dense model; None: nothing."""
        name = ALLOCATORS[self.budget.allocator].asks
        return None if name is None else CalibrationOptions((name,), host_sums=self.host_sums, seed=self.seed)

    def groups(self, model: nn.Module) -> tuple[Group, ...]:
        """What of `model` (the meta device is enough) is chosen among: what the criterion can judge."""
        return find_units(model, find_family(model.config), self.criterion.units, self.attention_unit)

    def check_depth(self, model: nn.Module) -> None:
        """Raise an InfeasibleBudgetError where `depth` names a tower that cannot lose a block."""
        towers = [group.tower for group in find_blocks(model, find_family(model.config))]
        if unable := sorted(self.depth.keys() - set(towers)):
            raise InfeasibleBudgetError(
                f"depth ratio of {unable[0]}: there is no such tower whose blocks can leave; this model has "
                f"{', '.join(towers) or 'none'}"
            )


@dataclass(frozen=True)
class Planned:
    """The order of all rounds so far, with the scores of the last of them."""

    order: Order
    scores: Scores

    @property
    def plan(self) -> Plan:
        return self.order.plan


def round_share(index: int, rounds: int, power: float) -> float:
    """Share of the target ratio that is removed after round `index` (1-based) of `rounds`; 1 after the last."""
    return float(1 - (1 - index / rounds) ** power)


def check_budget(model: PreTrainedModel, planning: Planning) -> None:
    """Refuse what cannot be met, before any calibration.

    Args:
        model: dense (the meta device is enough); cut where blocks leave first.

    Raises:
        InfeasibleBudgetError: no plan meets the budget.
    """
    planning.check_depth(model)
    dense, order = facts_of(model, planning.groups(model)), None
    for number in [1, planning.steps] if planning.depth else [planning.steps]:
        begun = planning.begun(order)
        step = planning.step(number, dense, begun)
        groups = step.groups(model)
        # What the floors allow does not depend on the scores, so any scores tell whether the budget can be met.
        scores = replace(score_groups(groups, CRITERIA["random"]), importance={group.key: 1.0 for group in groups})
        order = order_units(groups, scores, step.budget, _facts(model, groups, dense if order else None, begun))
        if number < planning.steps:
            apply_plan(model, order.plan)


def _ordered(groups: Sequence[Group], scores: Scores, step: Planning, facts: Facts) -> Order:
    """What goes in a round, which may be the beginning of what would go."""
    order = order_units(groups, scores, step.budget, facts)
    return order if step.until is None else order.beginning(step.until, (facts.dense or facts).parameters)


def _facts(model: PreTrainedModel, groups: Sequence[Group], dense: Facts | None, begun: Plan | None) -> Facts:
    """Of the model as it is cut; `dense`, if it is."""
    known = None if dense is None else replace(dense, sizes=_named(dense.sizes, begun))
    return facts_of(model, groups, dense=known)


def _named(values: Mapping[str, Value], begun: Plan | None) -> Mapping[str, Value]:
    """What is known of the dense model's groups, by what they are called once the blocks that leave first have left."""
    return {new: values[old] for old, new in begun.renamed(values).items()} if begun is not None else values


def plan_in_rounds(
    model: PreTrainedModel,
    batches: Callable[[int], Batches],
    planning: Planning,
    *,
    done: Order | None = None,
    on_round: Callable[[Planned], None] | None = None,
    progress: Progress = silent,
) -> Planned:
    """Decide what to cut from the dense `model`, which is left partly cut (all rounds but the last are applied to it).

    Args:
        batches: calibration batches of a round (0-based), with labels.
        done: the rounds of an interrupted run; the model must be dense all the same.
        on_round: called after every round.
        progress: called after every batch, with the batches done and to do in all rounds.

    Raises:
        InfeasibleBudgetError: no plan meets the budget; found before any calibration, or where blocks leave first by
            `check_budget` alone.
    """
    planning.check_depth(model)
    if not planning.depth:
        check_budget(model, planning)
    dense = facts_of(model, planning.groups(model))
    order, first = done, len(done.rounds) if done else 0
    known = planning.known
    groups = planning.groups(model)
    importance = (
        known.importance if known else importance_of(model, groups, partial(batches, 0), planning.asks, progress)
    )
    if order is not None:
        _redo(model, order, batches, planning, progress)
    for number in range(first + 1, planning.steps + 1):
        begun = planning.begun(order)
        step = planning.step(number, dense, begun)
        groups, scores = step.groups(model), step.known
        if scores is None:
            told = _over_rounds(progress, number, first, planning.steps)
            scores = score_units(model, groups, partial(batches, number - 1), step, told)
            if importance is not None and step.asks is not None:
                scores = replace(scores, importance=_named(importance, begun))
            scores = agreed(scores)
        take = partial(_take, groups, scores, step, _facts(model, groups, dense if order else None, begun))
        later = guarded(model, groups, take, batches(number - 1), progress) if step.guard else take(())
        plan = replace(
            later.plan,
            attention_unit=planning.attention_unit,
            seed=planning.seed,
            rounds=planning.rounds,
            options={**later.plan.options, **planning.besides()},
        )
        later = replace(later, plan=plan)
        order = later if order is None else order.compose(later)
        planned = Planned(order, scores)
        if on_round is not None:
            on_round(planned)
        if number < planning.steps:
            _cut(model, plan, batches(number - 1), planning, _in_round(progress, number, planning.steps))
    return planned


def _take(groups: Sequence[Group], scores: Scores, step: Planning, facts: Facts, spared: Collection[str]) -> Order:
    return _ordered(groups, scores.sparing(spared), step, facts)


def _redo(
    model: PreTrainedModel, done: Order, batches: Callable[[int], Batches], planning: Planning, progress: Progress
) -> None:
    """Cut the dense `model` as it was after the rounds of an interrupted run."""
    before = None
    for number, steps in enumerate(done.rounds):
        plan = done.plan_after(steps)
        told = _in_round(progress, number + 1, planning.steps)
        _cut(model, plan if before is None else plan.since(before), batches(number), planning, told)
        before = plan


def _cut(model: PreTrainedModel, plan: Plan, batches: Batches, planning: Planning, progress: Progress) -> None:
    """Cut `model` by the `plan` of a round, and compensate for what left as it is asked for."""
    family = find_family(model.config)
    groups = matching_groups(model, family, plan)
    work = [batch if callable(batch) else partial(dict, batch) for batch in batches]
    fitted = COMPENSATIONS[planning.between](
        model, family, groups, plan.keep, work, memory=planning.grad_memory_bytes, progress=progress
    )
    give_back_memory()  # while it is cut a model is there twice
    apply_plan(model, plan)
    if fitted is not None:
        fitted.put_into(model, lambda path: place(path, family, plan))


def score_units(
    model: PreTrainedModel,
    groups: Sequence[Group],
    batches: Callable[[], Batches],
    planning: Planning,
    progress: Progress = silent,
) -> Scores:
    """What the units of `model` are worth, by one calibration where the criterion looks at data."""
    calibration = None
    if planning.calibration.statistics:
        family = find_family(model.config)
        calibration = collect(model, family, groups, batches(), planning.calibration, progress)
    return score_groups(groups, planning.criterion, calibration, model, planning.seed)


def agreed(scores: Scores) -> Scores:
    """Those of the first process: from one cut on, all must have the same model."""
    for tensor in (*scores.values.values(), *scores.members.values()):
        processes.tell(tensor)
    if scores.importance is None:
        return scores
    processes.tell(importance := torch.tensor([*scores.importance.values()], dtype=torch.float64))
    return replace(scores, importance=dict(zip(scores.importance, importance.tolist(), strict=True)))


def _over_rounds(progress: Progress, number: int, first: int, rounds: int) -> Progress:
    """Tells of a batch of round `number` how far all rounds after `first` are, so that the first batches tell what is
    left of the whole plan.
    """

    def tell(stage: str, done: int, total: int, note: str = "", /) -> None:
        progress(stage, (number - first - 1) * total + done, (rounds - first) * total, part(number, rounds))

    return tell


def _in_round(progress: Progress, number: int, rounds: int) -> Progress:
    """Says of a stage of its own in which round it is."""
    return lambda stage, done, total, _note="", /: progress(stage, done, total, part(number, rounds))
