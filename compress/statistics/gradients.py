"""What calibration adds up over batches, by hooks: gradients of prunable weights and angles of tokens to weight rows.

Nothing of size tokens x channels outlives its batch, and per-batch squares never exist as a matrix that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from slimvlm.compress.errors import CalibrationError
from slimvlm.kernels import squared_sums, taylor_sums_batch

REDUCED = ("second", "fisher", "gate")  # squares are reduced to vectors at once: no gradient is kept
STILL_FINITE = torch.iinfo(torch.int64).max

Reduce = Callable[[Tensor, str], None]  # (tensor, "sum" | "min" | "max"): in place over all processes


@dataclass(frozen=True, slots=True)
class Side:
    """A prunable linear, the dimensions its scores are wanted for (0: rows, 1: columns), and `width`, rows or columns
    of one index (D for heads, 1 for channels).
    """

    path: str
    linear: nn.Linear
    dims: tuple[int, ...]
    width: int = 1

    def gradient_bytes(self, variant: str) -> int:
        """fp32 bytes of gradient sums this weight needs for a saliency."""
        matrices = {"mix": 2}.get(variant, 0 if variant in REDUCED else 1)
        return 4 * matrices * self.linear.weight.numel()


class GradientSums:
    """fp32 sums of the gradients of some weights over backward passes; within `with`, only these ask for gradients.

    `first` and `vectorized` keep G = sum of g; `mix` keeps G and the sum of g * g; `second` and `fisher` keep only the
    reduced vectors of (w * g)^2. g is the gradient of one micro-batch, so squares depend on the micro-batch size.

    Args:
        variant: the saliency.
        host: keep the sums in host memory, whatever device the weights are on.
    """

    def __init__(self, sides: Sequence[Side], variant: str, *, host: bool = False) -> None:
        self.sides = sides
        self.variant = variant
        self.host = host
        device = sides[0].linear.weight.device
        self._checks = torch.zeros(len(sides) + 1, device=device)  # one sum per weight, then the loss
        self._first_bad = torch.full_like(self._checks, STILL_FINITE, dtype=torch.int64)
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> GradientSums:
        for index, side in enumerate(self.sides):
            weight = side.linear.weight
            weight.requires_grad_(True)
            self._handles.append(weight.register_post_accumulate_grad_hook(partial(self._add, index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for side in self.sides:
            side.linear.weight.grad = None
            side.linear.weight.requires_grad_(False)
        self._sums.clear()
        self._squares.clear()

    def _add(self, index: int, weight: Tensor) -> None:
        side = self.sides[index]
        checked = grad = cast(Tensor, weight.grad)
        if self.variant in REDUCED:
            for dim in side.dims:
                sums = squared_sums(weight.detach(), grad, dim)
                kept = self._squares.setdefault(f"{side.path}:{dim}", torch.zeros_like(sums))
                kept += sums
            checked, weight.grad = kept, None
        elif not self._native(weight):
            checked = self._widen(side.path, grad)
            weight.grad = None
        self._checks[index] = checked.sum()  # NaN and Inf survive a sum; one read, no temporary

    def _native(self, weight: Tensor) -> bool:
        """Whether autograd's own accumulation already is the fp32 sum we want, where we want it."""
        here = weight.device.type == "cpu" or not self.host
        return weight.dtype == torch.float32 and here and self.variant != "mix"

    def _widen(self, path: str, grad: Tensor) -> Tensor:
        if self.host:
            grad = grad.to("cpu")
        if path not in self._sums:
            self._sums[path] = torch.zeros_like(grad, dtype=torch.float32)
        if self.variant == "mix":
            if path not in self._squares:
                self._squares[path] = torch.zeros_like(grad, dtype=torch.float32)
            wide = grad.float()
            self._squares[path].addcmul_(wide, wide)
        return self._sums[path].add_(grad)

    def close_batch(self, batch: int, loss: Tensor) -> None:
        """Note which sums stopped being finite in this batch; no synchronisation with the device."""
        self._checks[-1] = loss
        bad = ~self._checks.isfinite()
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=batch), self._first_bad)

    def require_finite(self, batches: int, reduce: Reduce) -> None:
        """Raise a CalibrationError naming batch and tensor if a sum is not finite (in any process)."""
        reduce(self._first_bad, "min")
        first_bad = self._first_bad.tolist()
        batch = min(first_bad)
        if batch == STILL_FINITE:
            return
        bad = [index for index, first in enumerate(first_bad) if first == batch]
        # The loss comes last; among weights, NaN spreads towards the input, so the last one is nearest its origin.
        name = "the loss" if bad[-1] == len(self.sides) else f"the gradient of {self.sides[bad[-1]].path}.weight"
        raise CalibrationError(
            f"{name} is not finite in calibration batch {batch + 1} of {batches}; check that batch's images and text, "
            "or load the model in float32 or bfloat16"
        )

    def saliency(self, micro_batches: int, reduce: Reduce) -> dict[str, Tensor]:
        """fp32 vectors on the CPU, keyed `path:dim`; gradient matrices are freed as they are reduced.

        Args:
            micro_batches: number of backward passes over all processes, the divisor of `second` and `mix`.
        """
        result: dict[str, Tensor] = {}
        if self.variant in REDUCED:
            for side in self.sides:
                self._reduced(side, micro_batches, reduce, result)
            return result
        # One batch, launched together; one by one if the sums are in host memory because the device has no room.
        step = 1 if self.host else len(self.sides)
        for start in range(0, len(self.sides), step):
            result |= self._full(self.sides[start : start + step], micro_batches, reduce)
        return result

    def _reduced(self, side: Side, micro_batches: int, reduce: Reduce, result: dict[str, Tensor]) -> None:
        for dim in side.dims:
            key = f"{side.path}:{dim}"
            weight = side.linear.weight
            sums = self._squares.get(key, torch.zeros(weight.shape[dim], device=weight.device))
            reduce(sums, "sum")
            result[key] = (sums / micro_batches if self.variant == "second" else sums).cpu()

    def _full(self, sides: Sequence[Side], micro_batches: int, reduce: Reduce) -> dict[str, Tensor]:
        wanted = []
        for side in sides:
            grad, square = self._accumulated(side, micro_batches, reduce)
            wanted += [(side, grad, square, dim) for dim in side.dims]
        _, grads, squares, dims = zip(*wanted, strict=True)
        weights = [side.linear.weight.detach() for side, *_ in wanted]
        sums = taylor_sums_batch(weights, grads, dims, variant=self.variant, squares=squares)
        return {f"{side.path}:{dim}": values.cpu() for (side, *_, dim), values in zip(wanted, sums, strict=True)}

    def _accumulated(self, side: Side, micro_batches: int, reduce: Reduce) -> tuple[Tensor, Tensor | None]:
        """The sum of the gradients and the mean of their squares over all processes; gives up what this object held."""
        weight = side.linear.weight
        # A weight the loss does not reach (a block behind LLaVA's feature layer) has no gradient: its sum is zero.
        held = weight.grad if self._native(weight) else self._sums.pop(side.path, None)
        grad = torch.zeros_like(weight, dtype=torch.float32) if held is None else held.to(weight.device)
        weight.grad = None
        reduce(grad, "sum")
        if self.variant != "mix":
            return grad, None
        square = self._squares.pop(side.path, torch.zeros_like(grad)).to(weight.device)
        reduce(square, "sum")
        return grad, square.div_(micro_batches)
