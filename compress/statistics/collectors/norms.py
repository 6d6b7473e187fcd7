"""How large the inputs of linears are, feature by feature, from a forward alone."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.statistics.collector import Collector, Reduce, Side


class InputNorms(Collector):
    """The L2 norm over the counted tokens of every input feature of a linear, keyed by path (Wanda, ICLR 2024)."""

    def start(self) -> None:
        self.squares: dict[str, Tensor] = {}
        for side in self.sides:
            weight = side.module.weight
            self.squares[side.path] = torch.zeros(weight.shape[1], device=weight.device)
            self._handles.append(side.module.register_forward_pre_hook(partial(self._add, side)))

    @torch.no_grad()
    def _add(self, side: Side, _: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        self.squares[side.path] += self.once(inputs[0], partial(self._squared, side))

    def _squared(self, side: Side, read: Tensor) -> Tensor:
        tokens = read.flatten(0, -2).float()
        mask = self.mask_of(side, len(tokens))
        if mask is not None:  # filled, not chosen: how many there are would wait for the device
            tokens = tokens.masked_fill(~mask[:, None], 0)
        return tokens.square().sum(0)

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        result = {}
        for path, squares in self.squares.items():
            reduce(squares, "sum")
            result[path] = squares.sqrt().cpu()
            if not result[path].isfinite().all():
                raise CalibrationError(f"the activations of {path} cannot be used: they are not finite")
        return result
