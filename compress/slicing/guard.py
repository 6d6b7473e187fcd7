"""What a round would take, tried before it is taken: attentions with which the loss jumps are given back.

A score says what a unit is worth while the others are there. Two heads that do the same are worth little each, so both
leave at once, and no refit makes up for what only they did. So the cut is tried, refitted, on some of the calibration
samples, and again with every attention that loses heads as it was. Where that wins back most of the loss for its
parameters, the attention is left alone in this round, others give what it does not, and the new cut is tried. It is
taken if its loss is clearly lower, and the next attention is asked.

Cost, in forward passes over `LOOKED_AT` batches: one for every cut that is tried and every attention that loses heads,
and one for the refits, whose moments are held as far as a refit's bound on memory allows, and else read again. Besides,
the weights of the output projections that lose columns, once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.compress import processes
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.data.questions import ask
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.computing import undisturbed
from slimvlm.compress.models.families import Family, find_family
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.slicing.refit import Batches as Work
from slimvlm.compress.slicing.refit import cut_projections, refit
from slimvlm.compress.statistics.loss import loss
from slimvlm.compress.statistics.reading import Batch, Batches

LOOKED_AT = 8  # batches of a calibration
CLEARLY = 0.98  # of the loss before
NAMES = ("weight", "bias")
STREAMED = (
    "--guard tries cuts on a model in memory, and this one is read block by block; leave it out, or give --stream off"
)
Weights = Mapping[str, tuple[Tensor, Tensor | None]]  # of modules by path: weight and bias


@dataclass(frozen=True)
class Trial:
    """A cut that was tried: its `order`, the output projections with zeros where columns go, and the loss a sample."""

    order: Order
    weights: Weights
    loss: float


def guarded(
    model: PreTrainedModel,
    groups: Sequence[Group],
    take: Callable[[Collection[str]], Order],
    batches: Batches,
    progress: Progress = silent,
) -> Order:
    """The order of a round, or a better one. The model is left as it is; several processes share the batches.

    Args:
        groups: of the model.
        take: the order that leaves these groups (keys) alone while others have anything to give.
        batches: functions that make a padded training batch.

    Raises:
        UnsuitableOptionError: the model is streamed.
    """
    if streamed(model):
        raise UnsuitableOptionError(STREAMED)
    family = find_family(model.config)
    work = [partial(opened, batch) for batch in batches[:LOOKED_AT]]
    held: dict[str, Tensor] = {}

    def tried(spared: Collection[str]) -> Trial:
        order = take(spared)
        weights = refitted(model, family, groups, order.plan.keep, work, held)
        return Trial(order, weights, loss_with(model, family, weights, work))

    best, gains = tried(()), dict[str, float]()
    cut = [group for group in groups if group.kind == "attention" and len(best.order.plan.keep[group.key]) < group.size]
    for done, group in enumerate(cut, start=1):
        own = {member.path for member in group.members}
        others = {path: one for path, one in best.weights.items() if path not in own}
        units = (group.size - len(best.order.plan.keep[group.key])) / group.indices_per_unit
        lost = loss_with(model, family, others, work)
        gains[group.key] = (best.loss - lost) / (units * group.parameters_per_unit)
        progress("guard", done, len(cut))
    spared: list[str] = []
    for key in sorted(gains, key=gains.__getitem__, reverse=True):
        other = tried([*spared, key])
        if other.loss > CLEARLY * best.loss:
            break
        best = other
        spared.append(key)
    return best.order


def opened(batch: Batch | Callable[[], Batch]) -> dict[str, Tensor]:
    """A batch, whether it is there or is made now."""
    return dict(batch() if callable(batch) else batch)


def refitted(
    model: PreTrainedModel,
    family: Family,
    groups: Sequence[Group],
    keep: Mapping[str, Sequence[int]],
    batches: Work,
    held: dict[str, Tensor],
) -> Weights:
    """What does in the whole model what the refitted projections do in the cut one."""
    sides, kept = cut_projections(model, family, groups, keep)
    fitted, weights = refit(model, family, groups, keep, batches, held=held).weights, {}
    for side in sides:
        own, columns = side.module.weight.detach(), kept[side.path].to(side.module.weight.device)
        new, bias = fitted.get(side.path, (own[:, columns], None))
        weights[side.path] = (torch.zeros_like(own).index_copy_(1, columns, new.to(own)), bias)
    return weights


def loss_with(model: PreTrainedModel, family: Family, weights: Weights, batches: Work) -> float:
    """Of a sample, the mean over its answer's tokens; with `weights` in the place of the model's."""
    seen = torch.zeros(2, dtype=torch.float64)  # the sum, and the samples
    with in_place(model, weights), undisturbed(model), torch.no_grad():
        for index in processes.share(len(batches)):
            if (question := ask(model, family, batches[index]())) is not None:
                seen += torch.tensor([loss(model, question, None)[0].item(), question.tally.samples])
    processes.reduce(seen, "sum")
    return float(seen[0] / seen[1].clamp(min=1))


@contextmanager
def in_place(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Other parameters for a while; those of the model are not written to."""
    modules = {path: model.get_submodule(path) for path in weights}
    own = {path: (module.weight, module.bias) for path, module in modules.items()}
    try:
        for path, values in weights.items():
            for name, value in zip(NAMES, values, strict=True):
                if value is not None:
                    setattr(modules[path], name, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for path, parameters in own.items():
            for name, parameter in zip(NAMES, parameters, strict=True):
                setattr(modules[path], name, parameter)
