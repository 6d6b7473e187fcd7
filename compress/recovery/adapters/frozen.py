"""A frozen base in 8 or 4 bits: what is not trained, and only read, takes a byte a weight (QLoRA, arXiv 2305.14314).

torchao's own linears keep a float copy of their weight for the backward pass, which is the memory this is to save; here
the weight is made of its codes again when the gradient of the input asks for it. 4-bit codes lie in a byte each, too:
torch's kernels for two in a byte have no backward on a CPU.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast  # Any: torch gives the contexts of its functions no type, torchao its tensors none

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from slimvlm.compress.models.quantized import hold_in


def freeze(model: PreTrainedModel, form: str, besides: Collection[nn.Module] = ()) -> None:
    """Puts the linears of a float model into `form` (of IN_TORCH), in place, in the dtype they compute in; `besides`:
    modules in which they stay as they are, because they are trained.

    Raises:
        MissingDependencyError: no torchao.
    """
    trained = {part for module in besides for part in module.modules()}
    for linear in hold_in(model, form, trained):
        linear.__class__ = FrozenLinear


class FrozenLinear(nn.Linear):
    """A linear whose weight is of codes; gradients pass to its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return cast(Tensor, _Frozen.apply(x, self.weight, bias))


class _Frozen(torch.autograd.Function):
    """x W^T + b for a weight of codes, of which no float copy outlives the call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # a tensor of tensors, which autograd does not keep as it is
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.dtype = x.dtype
        floats = weight.dequantize().to(dtype)
        return functional.linear(x.to(dtype), floats, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad @ ctx.weight.dequantize().to(grad.dtype)).to(ctx.dtype), None, None
