"""How much the loss minds a change of all the linears of a group, an attention or an MLP, together.

ECoFLaP (Sung, Yoon, Bansal, ICLR 2024) asks so how much of every block is to go: by gradients, or by the loss alone
where a backward pass does not fit. Both give a sum over the weights of a group, so that groups of any size compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.statistics.collector import Collector, Reduce, Side
from slimvlm.kernels import taylor_sums

STEP = (
    1e-2  # of the root mean square of a weight: bf16 can say it, and a loss in fp32 changes by more than its rounding
)


class FirstOrder(Collector):
    """Sum over batches and weights of |w g|, g the gradient of the batch: fp32 [1], keyed by group."""

    def start(self) -> None:
        self.sums = {side.path: torch.zeros((), dtype=torch.float64) for side in self.sides}
        for side in self.sides:
            for weight in weights_of(side):
                weight.requires_grad_(True)
                self._handles.append(weight.register_post_accumulate_grad_hook(partial(self._add, side.path)))

    def stop(self) -> None:
        for side in self.sides:
            for weight in weights_of(side):
                weight.requires_grad_(False)
                weight.grad = None

    def _add(self, key: str, weight: Tensor) -> None:
        sums = taylor_sums(weight.detach(), cast(Tensor, weight.grad), 0).double().sum()
        self.sums[key] = self.sums[key].to(sums.device) + sums
        weight.grad = None

    def require_finite(self, batches: int, reduce: Reduce) -> None:
        totals = torch.stack([total.cpu() for total in self.sums.values()])
        reduce(totals, "sum")
        if bad := [side.path for side, fine in zip(self.sides, totals.isfinite().tolist(), strict=True) if not fine]:
            raise CalibrationError(
                f"the gradients of {bad[-1]} are not finite; check the images and texts of the calibration, or load "
                "the model in float32 or bfloat16"
            )

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        return _over_processes(self.sums, reduce)


class ZerothOrder(Collector):
    """An estimate of the same from forward passes alone, two per draw: fp32 [1], keyed by group.

    Every draw perturbs all weights of a group at once by E = step * rms(W) * Z, Z standard normal, and takes
    p = (loss(W + E) - loss(W - E)) / (2 step) of one batch. |p| is on average 0.8 times the norm of rms(W) dL/dW, and
    the square root of the number of weights makes a sum over them of it; the relative error of a draw is 0.76, that of
    the mean of eight 0.27. The paper draws for single matrices, with a step that is the same for large and small
    weights. The weights are given back to the bit: they are copied, not computed back. All groups see the same batches.
    """

    def start(self) -> None:
        self.sums = {side.path: torch.zeros((), dtype=torch.float64) for side in self.sides}

    def stop(self) -> None:
        """Nothing is left: a perturbation ends with itself."""

    def perturb(self, batch: int, batches: int, loss: Callable[[], Tensor]) -> None:
        for draw in range(batch, self.statistic.draws, batches):
            for number, side in enumerate(self.sides):
                weights = weights_of(side)
                generator = torch.Generator(weights[0].device).manual_seed(self._seed(draw, number))
                change = [root_mean_square(weight) * _normal(weight, generator) for weight in weights]
                slope = abs(directional_slope(weights, change, STEP, loss))
                if not math.isfinite(slope):
                    raise CalibrationError(
                        f"the loss of calibration batch {batch + 1} of {batches} is not finite with {side.path} a "
                        "little changed; check that batch's images and text, or load the model in float32 or bfloat16"
                    )
                self.sums[side.path] += slope * math.sqrt(sum(weight.numel() for weight in weights))

    def _seed(self, draw: int, number: int) -> int:
        """Of a draw for a group, whichever process makes it."""
        return ((self.seed * self.statistic.draws + draw) * len(self.sides) + number) % 2**63

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        return {key: total / self.statistic.draws for key, total in _over_processes(self.sums, reduce).items()}


def directional_slope(
    weights: Sequence[Tensor], change: Sequence[Tensor], step: float, loss: Callable[[], Tensor]
) -> float:
    """(loss at W + step Z - loss at W - step Z) / (2 step): the loss's derivative along `change`, to second order.

    Args:
        weights: changed together and given back, also after an error.
        change: Z for each of them.
        loss: a scalar of the weights as they are when it is called.
    """
    values = []
    for sign in (step, -step):
        with _changed(weights, [sign * one for one in change]):
            values.append(float(loss()))
    return (values[0] - values[1]) / (2 * step)


@contextmanager
def _changed(weights: Sequence[Tensor], change: Sequence[Tensor]) -> Iterator[None]:
    kept = [weight.detach().clone() for weight in weights]
    try:
        for weight, one in zip(weights, change, strict=True):
            weight.copy_(weight + one)
        yield
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.copy_(before)


def weights_of(side: Side) -> list[Tensor]:
    """The matrices of a group."""
    return [linear.weight for linear in side.module]


def root_mean_square(weight: Tensor) -> Tensor:
    """Of all entries, fp32: a square in fp16 would not fit."""
    return weight.float().square().mean().sqrt()


def _normal(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(weight.shape, generator=generator, device=weight.device)


def _over_processes(sums: dict[str, Tensor], reduce: Reduce) -> dict[str, Tensor]:
    totals = torch.stack([total.cpu() for total in sums.values()])
    reduce(totals, "sum")
    return dict(zip(sums, totals.float().view(-1, 1), strict=True))
