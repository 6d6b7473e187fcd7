"""Histograms of the angles between tokens and weight rows, from the outputs a forward computes anyway."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.statistics.gradients import Reduce
from slimvlm.kernels import angle_histogram, histogram_entropy, row_norms

BINS = 100  # of the cosine over [-1, 1]: the paper's choice


class AngleHistograms:
    """Histograms of cos(input token, weight row) of some linears, from the outputs they compute anyway (forward hooks).

    Args:
        linears: path -> (linear, stream): `stream` names the mask of the tokens this linear reads.
        faithful: drop cosines that rounding pushed outside [-1, 1], as the paper's code does.
    """

    def __init__(self, linears: Mapping[str, tuple[nn.Linear, str]], *, faithful: bool = False) -> None:
        self.linears = linears
        self.faithful = faithful
        self.counts: dict[str, Tensor] = {}
        self._masks: Mapping[str, Tensor | None] = {}
        self._norms: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None  # q, k, v (or gate, up) read one tensor: its norms, once
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> AngleHistograms:
        for path, (linear, stream) in self.linears.items():
            weight = linear.weight.detach()
            self._norms[path] = row_norms(weight)
            self.counts[path] = torch.zeros(weight.shape[0], BINS, dtype=torch.int64, device=weight.device)
            self._handles.append(linear.register_forward_hook(partial(self._count, path, stream)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.expect({})

    def expect(self, masks: Mapping[str, Tensor | None]) -> None:
        """The masks (bool [B, S], True: counts; None: all do) of the next forward, by stream."""
        self._masks = masks
        self._last = None

    @torch.no_grad()
    def _count(self, path: str, stream: str, linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._last is None or self._last[0] is not inputs[0]:
            tokens = inputs[0].detach().flatten(0, -2)
            self._last = (inputs[0], row_norms(tokens))
        norms = self._last[1]
        mask = self._masks[stream]
        if mask is not None and mask.numel() != norms.numel():
            raise CalibrationError(
                f"{path} reads {norms.numel()} tokens but the batch's mask has {mask.numel()}; "
                "the samples must be padded, not packed"
            )
        bias = None if linear.bias is None else linear.bias.detach()
        rows = output.detach().flatten(0, -2)
        mask = None if mask is None else mask.flatten()
        try:
            angle_histogram(rows, norms, self._norms[path], bias, self.counts[path], mask=mask, faithful=self.faithful)
        except ValueError as error:
            raise CalibrationError(f"the activations of {path} cannot be used: {error}") from error

    def entropy(self, reduce: Reduce) -> dict[str, Tensor]:
        """fp32 [rows] in nats on the CPU, per linear.

        Raises:
            CalibrationError: a linear saw no token.
        """
        result = {}
        for path, counts in self.counts.items():
            reduce(counts, "sum")
            if not counts.any():
                raise CalibrationError(f"{path} saw no token of the calibration samples; check that they hold text")
            result[path] = histogram_entropy(counts).cpu()
        return result
