"""What a batch is of a step whose samples are shared: its losses are then parts that add up to those of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor


def _own(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True)
class Share:
    """What this process has of the samples that all of them look at together.

    A mean over tokens counts by its tokens. What compares all samples at once (the features of a block, the pairs of a
    dual encoder) every process computes as a whole, by sums over all of them, and adds an even part of it; its gradient
    in a process's samples is that of all these parts, of which each is the same.

    Attributes:
        weights: by what the losses of these names are multiplied.
        even: by what all others are.
        first: of the samples of all processes, the number of the first one of this.
        samples: those of all processes.
        processes: how many.
        sum: over them, in place.
    """

    weights: Mapping[str, float | Tensor] = field(default_factory=dict)
    even: float = 1.0
    first: int = 0
    samples: int = 0
    processes: int = 1
    sum: Callable[[Tensor], Tensor] = _own

    def weight(self, loss: str) -> float | Tensor:
        """By what this loss of the batch is multiplied, to be a part of the step's."""
        return self.weights.get(loss, self.even)

    def joined(self, rows: Tensor) -> Tensor:
        """The rows [b, C], one per sample, of all processes [samples, C], with gradients."""
        return rows if self.processes == 1 else cast(Tensor, _Joined.apply(rows, self))


WHOLE = Share()


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, share: Share) -> Tensor:  # Any: torch gives it no type
        ctx.processes, ctx.mine = share.processes, slice(share.first, share.first + len(rows))
        found = rows.new_zeros((share.samples, *rows.shape[1:]), dtype=torch.float32)
        found[ctx.mine] = rows.float()
        return share.sum(found).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.mine] * ctx.processes, None
