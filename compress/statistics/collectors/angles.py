"""Histograms of the angles between tokens and weight rows, from the outputs a forward computes anyway."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.statistics.collector import Collector, Reduce, Side
from slimvlm.kernels import angle_histogram, histogram_entropy, row_norms

BINS = 100  # of the cosine over [-1, 1]: the paper's choice


class AngleHistograms(Collector):
    """Entropy of the histogram of cos(input token, weight row): in nats per row, of the text model's row-cut linears.

    The statistic `paper-angles` drops cosines that rounding pushed outside [-1, 1], as the paper's code does.
    """

    def start(self) -> None:
        self.counts: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._sent = {side.path for side in self.sides if side.expert is not None}  # some experts may see no token
        for side in self.sides:
            if side.stream is not None and 0 in side.dims:
                weight = side.module.weight.detach()
                self._norms[side.path] = row_norms(weight)
                self.counts[side.path] = torch.zeros(weight.shape[0], BINS, dtype=torch.int64, device=weight.device)
                self._handles.append(side.module.register_forward_hook(partial(self._count, side)))

    @torch.no_grad()
    def _count(self, side: Side, linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        norms = self.once(inputs[0], lambda read: row_norms(read.detach().flatten(0, -2)))
        bias = None if linear.bias is None else linear.bias.detach()
        rows = output.detach().flatten(0, -2)
        counts, mask = self.counts[side.path], self.mask_of(side, len(norms))
        literal = self.statistic.name == "paper-angles"
        try:
            angle_histogram(rows, norms, self._norms[side.path], bias, counts, mask=mask, drop_outside=literal)
        except ValueError as error:
            raise CalibrationError(f"the activations of {side.path} cannot be used: {error}") from error

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        result = {}
        for path, counts in self.counts.items():
            reduce(counts, "sum")
            seen = counts.any()
            if not (seen or path in self._sent):
                raise CalibrationError(f"{path} saw no token of the calibration samples; check that they hold text")
            result[path] = histogram_entropy(counts).cpu() if seen else torch.zeros(len(counts))
        return result
