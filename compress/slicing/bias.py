"""Bias compensation: what an output projection made of the mean of its cut inputs goes into its bias.

    b' = b + W_P mean(x_P),   P the cut columns, over all calibration tokens: those that a model meets when it answers

An et al., FLAP, AAAI 2024. The kept weights stay as they are; what is lost is the fluctuation of the cut inputs about
their means. One reading of the data, and a sum of the size of a bias per projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import Group
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.slicing.cuts import complement
from slimvlm.compress.slicing.refit import Batches, Refit, cut_projections, keeping, look, mean_losses, shifted
from slimvlm.compress.statistics.collector import Collector, Reduce, Side
from slimvlm.compress.statistics.rows import Statistic

LOST = Statistic("lost", "forward", "bias", "Lost")


class Lost(Collector):
    """What the cut columns add to the outputs [O] of projections over the counted tokens, all fp64: the sum by `path`;
    the sum of its square by `path:cut`, and of the output's, without bias, by `path:all`; the tokens by `path:tokens`.

    Args:
        kept: by path the columns that stay.
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        super().__init__(LOST)
        self.kept = kept

    def start(self) -> None:
        self.seen: dict[str, Tensor] = {}
        for side in self.sides:
            weight, path = side.module.weight, side.path
            sizes = {path: (len(weight),), f"{path}:cut": (), f"{path}:all": (), f"{path}:tokens": ()}
            self.seen |= {key: weight.new_zeros(size, dtype=torch.float64) for key, size in sizes.items()}
            dropped = complement(self.kept[path], weight.shape[1]).to(weight.device)
            self._handles.append(side.module.register_forward_hook(partial(self._add, side, dropped)))

    @torch.no_grad()
    def _add(self, side: Side, dropped: Tensor, linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens = inputs[0].flatten(0, -2).index_select(1, dropped)
        whole = output.flatten(0, -2).float() - (0 if linear.bias is None else linear.bias.float())
        lost = tokens.float() @ linear.weight.index_select(1, dropped).float().T
        mask = self.mask_of(side, len(tokens))
        counted = torch.ones_like(lost[:, 0], dtype=torch.bool) if mask is None else mask
        # Filled, not chosen: how many there are would wait for the device.
        whole, lost = (part.masked_fill(~counted[:, None], 0) for part in (whole, lost))
        found = (lost.sum(0), lost.square().sum(), whole.square().sum(), counted.sum())
        for key, value in zip(("", ":cut", ":all", ":tokens"), found, strict=True):
            self.seen[f"{side.path}{key}"] += value

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        for value in self.seen.values():
            reduce(value, "sum")
        return self.seen


def give_means(  # noqa: PLR0913 (as `refit`)
    model: PreTrainedModel,
    family: Family,
    groups: Sequence[Group],
    keep: Mapping[str, Sequence[int]],
    batches: Batches,
    *,
    memory: int | None = None,
    progress: Progress = silent,
) -> Refit:
    """As `refit`, of the biases alone; `memory` bounds nothing here.

    Raises:
        CalibrationError: a sum is not finite, or there are no tokens.
    """
    sides, kept = cut_projections(model, family, groups, keep)
    sides = [side for side in sides if side.expert is None]  # stacked, experts have no bias
    weights, losses, hold = {}, [], keeping(model)

    def solve(chosen: Sequence[Side], seen: Mapping[str, Tensor]) -> None:
        for side in chosen:
            total, cut, whole, tokens = (seen[f"{side.path}{key}"] for key in ("", ":cut", ":all", ":tokens"))
            mean = total / tokens
            if not (mean.isfinite().all() and cut.isfinite()):
                raise CalibrationError(f"the inputs of {side.path} are not finite, or there are none; check the data")
            weight = side.module.weight.detach()
            bias = shifted(side.module.bias, mean.float(), weight.dtype)
            weights[side.path] = hold(weight.index_select(1, kept[side.path].to(weight.device))), hold(bias)
            left = cut - tokens * mean.square().sum()
            losses.append(((cut / whole).item(), (left / whole).clamp(min=0).item()))

    look((model, family, batches), Lost(kept), sides, solve, progress)
    return Refit(weights, *mean_losses(losses))
