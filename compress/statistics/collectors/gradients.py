"""Gradients of the prunable weights, added up over batches by hooks; per-batch squares never exist as a kept matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.statistics.collector import Collector, Reduce, Side
from slimvlm.kernels import squared_sums, taylor_sums_batch

MATRICES = {"first": 1, "vectorized": 1, "mix": 2}  # fp32, of a weight's size; squares are reduced to vectors at once
STILL_FINITE = torch.iinfo(torch.int64).max


class GradientSums(Collector):
    """fp32 sums of the gradients of some weights over backward passes; meanwhile only these ask for gradients.

    `first` and `vectorized` keep G = sum of g; `mix` keeps G and the sum of g * g; `second` and `fisher` keep only the
    reduced vectors of (w * g)^2. g is the gradient of one micro-batch, so squares depend on the micro-batch size.
    """

    def bytes_needed(self, side: Side) -> int:
        return 4 * MATRICES.get(self.statistic.name, 0) * int(side.module.weight.numel())

    def start(self) -> None:
        device = self.sides[0].module.weight.device
        self._checks = torch.zeros(len(self.sides) + 1, device=device)  # one sum per weight, then the loss
        self._first_bad = torch.full_like(self._checks, STILL_FINITE, dtype=torch.int64)
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._micro_batches = 0
        for index, side in enumerate(self.sides):
            self._listen(index, side)

    def _listen(self, index: int, side: Side) -> None:
        weight = side.module.weight
        weight.requires_grad_(True)
        self._handles.append(weight.register_post_accumulate_grad_hook(partial(self._add, index)))

    def stop(self) -> None:
        for side in self.sides:
            side.module.weight.grad = None
            side.module.weight.requires_grad_(False)
        self._sums.clear()
        self._squares.clear()

    def _add(self, index: int, weight: Tensor) -> None:
        side = self.sides[index]
        checked = grad = cast(Tensor, weight.grad)
        if self.statistic.name not in MATRICES:
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
        return weight.dtype == torch.float32 and here and self.statistic.name != "mix"

    def _widen(self, path: str, grad: Tensor) -> Tensor:
        if self.host:
            grad = grad.to("cpu")
        if path not in self._sums:
            self._sums[path] = torch.zeros_like(grad, dtype=torch.float32)
        if self.statistic.name == "mix":
            if path not in self._squares:
                self._squares[path] = torch.zeros_like(grad, dtype=torch.float32)
            wide = grad.float()
            self._squares[path].addcmul_(wide, wide)
        return self._sums[path].add_(grad)

    def close_batch(self, batch: int, loss: Tensor) -> None:
        """Note which sums stopped being finite in this batch; no synchronisation with the device."""
        self._micro_batches += 1
        self._checks[-1] = loss
        bad = ~self._checks.isfinite()
        self._first_bad = torch.where(bad, self._first_bad.clamp(max=batch), self._first_bad)

    def require_finite(self, batches: int, reduce: Reduce) -> None:
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

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        """Keyed `path:dim`; gradient matrices are freed as they are reduced."""
        count = torch.tensor(self._micro_batches)
        reduce(count, "sum")
        self._micro_batches = int(count)
        result: dict[str, Tensor] = {}
        if self.statistic.name not in MATRICES:
            for side in self.sides:
                result |= self._reduced(side, reduce)
            return result
        # One batch, launched together; one by one if the sums are in host memory because the device has no room.
        step = 1 if self.host else len(self.sides)
        for start in range(0, len(self.sides), step):
            result |= self._full(self.sides[start : start + step], reduce)
        return result

    def _reduced(self, side: Side, reduce: Reduce) -> dict[str, Tensor]:
        result = {}
        for dim in side.dims:
            key = f"{side.path}:{dim}"
            weight = side.module.weight
            sums = self._squares.get(key, torch.zeros(weight.shape[dim], device=weight.device))
            reduce(sums, "sum")
            result[key] = (sums / self._micro_batches if self.statistic.name == "second" else sums).cpu()
        return result

    def _full(self, sides: Sequence[Side], reduce: Reduce) -> dict[str, Tensor]:
        wanted = []
        for side in sides:
            grad, square = self._accumulated(side, reduce)
            wanted += [(side, grad, square, dim) for dim in side.dims]
        _, grads, squares, dims = zip(*wanted, strict=True)
        weights = [side.module.weight.detach() for side, *_ in wanted]
        sums = taylor_sums_batch(weights, grads, dims, variant=self.statistic.name, squares=squares)
        return {f"{side.path}:{dim}": values.cpu() for (side, *_, dim), values in zip(wanted, sums, strict=True)}

    def _accumulated(self, side: Side, reduce: Reduce) -> tuple[Tensor, Tensor | None]:
        """The sum of the gradients and the mean of their squares over all processes; gives up what this object held."""
        weight = side.module.weight
        # A weight the loss does not reach (a block behind LLaVA's feature layer) has no gradient: its sum is zero.
        held = weight.grad if self._native(weight) else self._sums.pop(side.path, None)
        grad = torch.zeros_like(weight, dtype=torch.float32) if held is None else held.to(weight.device)
        weight.grad = None
        reduce(grad, "sum")
        if self.statistic.name != "mix":
            return grad, None
        square = self._squares.pop(side.path, torch.zeros_like(grad)).to(weight.device)
        reduce(square, "sum")
        return grad, square.div_(self._micro_batches)
