"""How far blocks turn the image tokens of a sequence, token by token, from a forward alone."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from slimvlm.compress.data.questions import TEXT, Question
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.statistics.collector import Collector, Reduce, Side
from slimvlm.compress.statistics.collectors.turning import Many, turn


class Drift(Collector):
    """Mean over the image tokens that count of 1 - cos(what goes into a block, what comes out), fp32 [1], keyed by
    path; of the blocks that read image and text in one sequence (ATV-Pruning, CVPR 2026). 0 where there is no image.

    Attributes:
        turned: path -> for every question that was seen, in turn, the drift of its image tokens, fp32 on the CPU.
    """

    def start(self) -> None:
        self.turned: dict[str, list[Tensor]] = {}
        for side in self.sides:
            if side.stream == TEXT:
                self.turned[side.path] = []
                self._handles.append(side.module.register_forward_hook(partial(self._add, side), with_kwargs=True))

    def see(self, question: Question) -> None:
        super().see(question)
        counts, images = question.masks[TEXT], question.images
        assert images is not None  # its sequences hold images: see `pools.check_pool`
        self._images = (images if counts is None else images & counts).flatten().nonzero()[:, 0]

    @torch.no_grad()
    def _add(self, side: Side, _: nn.Module, args: Many, kwargs: dict[str, Tensor], output: Tensor | Many) -> None:
        self.turned[side.path].append(turn(args, kwargs, output)[self._images].cpu())

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        result = {}
        for path, turned in self.turned.items():
            sums = torch.zeros(2, dtype=torch.float64)
            for drift in turned:
                sums += torch.stack([drift.double().sum(), torch.tensor(len(drift))])
            reduce(sums, "sum")
            total, tokens = sums.tolist()
            result[path] = torch.tensor([total / max(tokens, 1)])
            if not result[path].isfinite().all():
                raise CalibrationError(f"what {path} does to the image tokens is not finite; check the data")
        return result
