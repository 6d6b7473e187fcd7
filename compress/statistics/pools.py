"""Which tokens of a sequence of image and text tokens count: the pools of criteria that need a forward alone.

A model's text is the part that suffers most from a cut, and images have most of the tokens. ATV-Pruning (CVPR 2026)
therefore takes all text tokens, and of the image tokens those that a block turns most:

    s = mean over all image tokens of 1 - cos(what goes into the block, what comes out)
    K = min(image tokens, round(min(1, alpha s) T)),   T text tokens of the sample, half to even

block by block, sample by sample. The paper asks the layers in turn, each with the layers before it pruned, as
`sparsify` does; for a plan of units all are asked of the model as it is, in one reading of the data more. Answers are
text. A sample none of whose tokens is in
the pool counts with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from slimvlm.compress.data.questions import TEXT, Masks, Question, image_tokens, stream_through
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import live_blocks
from slimvlm.compress.statistics.collector import Collector, Reduce, Side
from slimvlm.compress.statistics.collectors.drift import Drift
from slimvlm.compress.statistics.rows import STATISTICS, TokenRule

Choice = Callable[[int, Question], Masks]  # (number of the question in a reading, the question) -> what counts


def check_pool(rule: TokenRule, family: Family, config: object) -> None:
    """Refuse a choice among image and text tokens where no sequence holds both.

    Raises:
        UnsuitableOptionError: so it is in a model of this family and config.
    """
    if rule.pool != "all" and not image_tokens(config):
        raise UnsuitableOptionError(
            f"--tokens {rule.name} chooses among the image and text tokens of one sequence, and {family.name} reads "
            "images and texts apart; leave --tokens out"
        )


def choice(pool: str) -> Choice:
    """The tokens of a pool that looks at no more than which of them are images (`atv`: the text)."""

    def chosen(_: int, question: Question) -> Masks:
        if pool == "all":
            return question.masks
        real, images = _apart(question)
        return {**question.masks, TEXT: _or_all(images if pool == "image" else real & ~images, real)}

    return chosen


def counting(rule: TokenRule, blocks: Sequence[Side], read: Callable[[Collector], object], reduce: Reduce) -> Choice:
    """What counts by `rule`, which may ask, in a reading of its own, how far `blocks` turn every image token.

    Args:
        blocks: of `mixed_blocks`; none: those of other towers, which have no image tokens of their own to choose.
        read: has a collector see the data, in which every token counts that is none of padding.
    """
    if not (rule.alpha and blocks):
        return choice(rule.pool)
    drift = Drift(STATISTICS["drift"])
    with drift.watch(blocks):
        read(drift)
        return drifting(rule.alpha, drift.turned, drift.finish(reduce))


def mixed_blocks(model: nn.Module, family: Family) -> list[Side]:
    """The blocks that image and text tokens go through in one sequence."""
    paths = [
        f"{tower.blocks}.{index}"
        for tower in family.towers
        if stream_through(family, tower) == TEXT
        for index in range(live_blocks(model, family, tower))
    ]
    return [Side(path, model.get_submodule(path), (), stream=TEXT, block=path) for path in paths]


class Chosen(Collector):
    """Shows a collector what counts by a choice, in one reading; that one watches."""

    def __init__(self, collector: Collector, chosen: Choice) -> None:
        super().__init__(collector.statistic)
        self.collector, self.chosen, self.number = collector, chosen, -1

    def see(self, question: Question) -> None:
        self.number += 1
        self.collector.see(replace(question, masks=self.chosen(self.number, question)))


def drifting(alpha: float, turned: Mapping[str, Sequence[Tensor]], means: Mapping[str, Tensor]) -> Choice:
    """The text tokens, and in every block the image tokens that it turns most.

    Args:
        turned: per block, question by question, how far each image token is turned; see `Drift`.
        means: of all of them, per block.
    """

    def chosen(number: int, question: Question) -> Masks:
        real, images = _apart(question)
        text = real & ~images
        masks = {**question.masks, TEXT: _or_all(text, real)}
        for path, questions in turned.items():
            drift = torch.full(images.shape, -1.0, device=images.device)
            drift[images] = questions[number].to(images.device)
            rank = drift.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            budget = (min(1.0, alpha * float(means[path])) * text.sum(1).double()).round()
            masks[path] = _or_all(text | images & (rank < budget[:, None]), real)
        return masks

    return chosen


def _apart(question: Question) -> tuple[Tensor, Tensor]:
    """(the tokens that count, the image tokens among them), bool [B, S]."""
    images, real = question.images, question.masks[TEXT]
    assert images is not None  # its sequences hold images: see `check_pool`
    return (torch.ones_like(images), images) if real is None else (real, images & real)


def _or_all(pool: Tensor, real: Tensor) -> Tensor:
    """The pool, or where a sample has none of it all that is `real`."""
    return pool | (real & ~pool.any(1, keepdim=True))
