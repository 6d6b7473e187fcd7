"""How much the loss would change if a unit were switched off, measured at the unit's gate.

Give every unit a gate m = 1 that multiplies what it feeds into its output projection. One backward pass gives the exact
derivative dL/dm = sum over tokens of x * dL/dx for every unit and every example, from activations alone: no gradient of
any weight is formed or kept. The sum over examples of its square is the diagonal Fisher information of the gates
(Kwon et al., NeurIPS 2022, arXiv:2204.09656). It squares per example and after adding up a unit's weights; the
criterion `fisher` squares weight by weight.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from slimvlm.compress.statistics.collector import Reduce, Side
from slimvlm.compress.statistics.collectors.gradients import GradientSums


class GateSquares(GradientSums):
    """Sums over examples of (dL/dm)^2 for the gate m of every channel and query head.

    An example is one row of the projection's input [B, S, units * width]. Towers that pack all images of a batch into
    one sequence [tokens, units * width] count a batch as one example.
    """

    def _listen(self, index: int, side: Side) -> None:
        if 1 in side.dims:
            self._handles.append(side.module.register_forward_pre_hook(partial(self._watch, index)))

    def _watch(self, index: int, _linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            entering = inputs[0]
            if not entering.requires_grad:  # nothing before it was watched: the graph begins here
                entering.requires_grad_(True)
            entering.register_hook(partial(self._square, index, entering.detach()))

    def _square(self, index: int, entering: Tensor, grad: Tensor) -> None:
        side = self.sides[index]
        product = entering.float() * grad
        examples = product.shape[0] if product.ndim > 2 else 1
        gates = product.view(examples, -1, product.shape[-1] // side.width, side.width).sum((1, 3))
        squares = gates.square_().sum(0)
        kept = self._squares.setdefault(side.path, torch.zeros_like(squares))
        kept += squares
        self._checks[index] = kept.sum()

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        """A gate's square spread evenly over its columns, no row has any."""
        result = {}
        for side in self.sides:
            rows, columns = side.module.weight.shape
            if 0 in side.dims:
                result[f"{side.path}:0"] = torch.zeros(rows)
            if 1 in side.dims:
                empty = torch.zeros(columns // side.width, device=side.module.weight.device)
                squares = self._squares.get(side.path, empty)
                reduce(squares, "sum")
                result[f"{side.path}:1"] = squares.repeat_interleave(side.width).cpu() / side.width
        return result
