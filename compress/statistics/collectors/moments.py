"""First and second moments of what output projections read, from a forward alone."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from slimvlm.compress.data.questions import Question
from slimvlm.compress.statistics.collector import Collector, Reduce, Side

DAMPING = 0.01  # of the mean of C's diagonal; 1e-4 to 1e-1 differ little on the demo model


class Moments(Collector):
    """Over the counted tokens x [I] that a column-cut linear reads: the sum of x x^T by `path`, fp32 [I, I]; of x by
    `path:sum`, fp32 [I]; their number by `path:tokens`, int64 []. All stay where the weights are.
    """

    def bytes_needed(self, side: Side) -> int:
        return 4 * side.module.weight.shape[1] ** 2 if 1 in side.dims else 0

    def start(self) -> None:
        self.seen: dict[str, Tensor] = {}
        for side in self.sides:
            if 1 in side.dims:
                weight, path = side.module.weight, side.path
                self.seen[path] = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
                self.seen[f"{path}:sum"] = torch.zeros(weight.shape[1], device=weight.device)
                self.seen[f"{path}:tokens"] = torch.zeros((), dtype=torch.int64)
                self._handles.append(side.module.register_forward_pre_hook(partial(self._add, side)))

    def stop(self) -> None:
        self.seen = {}

    def see(self, question: Question) -> None:
        super().see(question)  # which tokens count is looked up here, once: it waits for the device
        self._counted = {
            stream: mask.flatten().nonzero()[:, 0] for stream, mask in question.masks.items() if mask is not None
        }

    @torch.no_grad()
    def _add(self, side: Side, _: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].flatten(0, -2)
        mask = self.mask_of(side, len(tokens))
        if mask is not None and side.expert is not None:
            tokens = tokens[mask]
        elif mask is not None:
            tokens = tokens.index_select(0, self._counted[self.chosen_for(str(side.stream), side.block)])
        tokens = tokens.float()
        self.seen[side.path].addmm_(tokens.T, tokens)
        self.seen[f"{side.path}:sum"] += tokens.sum(0)
        self.seen[f"{side.path}:tokens"] += len(tokens)

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        for moment in self.seen.values():
            reduce(moment, "sum")
        return self.seen


def about_mean(products: Tensor, total: Tensor, count: Tensor | int) -> Tensor:
    """The sum of (x - mean) (x - mean)^T, of those of x x^T and of x over `count` tokens."""
    mean = total.to(products) / max(int(count), 1)
    return products.addr(mean, mean, alpha=-int(count))
