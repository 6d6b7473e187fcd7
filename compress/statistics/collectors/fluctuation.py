"""How much what output projections read fluctuates, feature by feature, from a forward alone."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.statistics.collector import Collector, Reduce, Side


class Fluctuation(Collector):
    """The variance over the counted tokens of every input feature of a column-cut linear, fp32 [I], keyed by path
    (An et al., FLAP, AAAI 2024).

    Batches are summed about their own means in fp32, and joined in fp64: features whose mean is far from zero lose none
    of their variance to rounding.
    """

    def start(self) -> None:
        self.sums: dict[str, Tensor] = {}  # (tokens, sum, sum of squares) x features
        for side in self.sides:
            if 1 in side.dims:
                weight = side.module.weight
                self.sums[side.path] = torch.zeros(3, weight.shape[1], dtype=torch.float64, device=weight.device)
                self._handles.append(side.module.register_forward_pre_hook(partial(self._add, side)))

    @torch.no_grad()
    def _add(self, side: Side, _: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].flatten(0, -2).float()
        mask = self.mask_of(side, len(tokens))
        counted = tokens.new_ones(len(tokens), 1) if mask is None else mask[:, None].to(tokens)
        if mask is not None:  # filled, not chosen: how many there are would wait for the device
            tokens = tokens.masked_fill(~mask[:, None], 0)
        number = counted.sum().double()
        mean = tokens.sum(0) / counted.sum().clamp(min=1)
        about = ((tokens - mean) * counted).square().sum(0)
        total = number * mean.double()
        squares = about.double() + total * mean.double()
        self.sums[side.path] += torch.stack([number.expand_as(total), total, squares])

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        result = {}
        for side in (side for side in self.sides if side.path in self.sums):
            path, sums = side.path, self.sums[side.path]
            reduce(sums, "sum")
            number, total, squares = sums
            if side.expert is not None and number[0] < 2:  # no token was sent to it, or a single one
                number = number + 2
            variance = (squares - total * total / number) / (number - 1)
            if not variance.isfinite().all():
                raise CalibrationError(f"the inputs of {path} are not finite, or fewer than two; check the data")
            result[path] = variance.clamp(min=0).float().cpu()
        return result
