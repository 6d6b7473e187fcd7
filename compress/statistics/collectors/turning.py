"""How far blocks turn the residual stream, from a forward alone."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.statistics.collector import Collector, Reduce, Side

Many = tuple[Tensor, ...]


def turn(args: Many, kwargs: dict[str, Tensor], output: Tensor | Many) -> Tensor:
    """1 - cos(what goes into a block, what comes out) of every token, fp32 [tokens]; what a hook on the block is told.

    In the precision of the weights the least turns would be none: next to 1, bfloat16 knows steps of 0.004.
    """
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple) else output
    return (1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).flatten().clamp(min=0)


class Turning(Collector):
    """Mean over the counted tokens of 1 - cos(what goes into a block, what comes out), fp32 [1], keyed by path.

    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024: block influence.
    """

    def start(self) -> None:
        self.sums: dict[str, Tensor] = {}  # (sum, tokens): more tokens than fp32 can count
        for side in self.sides:
            self.sums[side.path] = torch.zeros(2, dtype=torch.float64)
            self._handles.append(side.module.register_forward_hook(partial(self._add, side), with_kwargs=True))

    @torch.no_grad()
    def _add(self, side: Side, _: nn.Module, args: Many, kwargs: dict[str, Tensor], output: Tensor | Many) -> None:
        turned = turn(args, kwargs, output)
        mask = self.mask_of(side, len(turned))
        counted = torch.ones_like(turned, dtype=torch.bool) if mask is None else mask
        # Filled, not chosen: how many there are would wait for the device.
        found = torch.stack([turned.where(counted, 0).double().sum(), counted.sum().double()])
        self.sums[side.path] = self.sums[side.path].to(found.device) + found

    def finish(self, reduce: Reduce) -> dict[str, Tensor]:
        result = {}
        for path, sums in self.sums.items():
            reduce(sums, "sum")
            total, tokens = sums.tolist()
            result[path] = torch.tensor([total / max(tokens, 1)])
            if not (tokens and result[path].isfinite().all()):
                raise CalibrationError(f"what {path} does to its tokens is not finite, or it saw none; check the data")
        return result
