"""A student that computes with the weights its export will have: rounded in the forward, trained as if they were not.

A linear or an embedding with weight W puts out what W' would, the rounded W (of an adapted linear: of the weight that
merging will make), while gradients pass as if the rounding were not there (straight through: Bengio et al., arXiv
1308.3432). The weights themselves are never touched: what is merged and saved is W, whose rounding was trained.

torchao's fake-quantised linears do not do this: they round the frozen weight and not its sum with the low-rank layers,
take only widths that are multiples of a block, and have no scale of ONNX Runtime's kind (`largest / -2**(bits - 1)`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from slimvlm.compress.options import BLOCK, ROUNDED
from slimvlm.compress.recovery.adapters.recall import RecallLinear, merged_weight


@contextmanager
def rounded(model: PreTrainedModel, variant: str | None) -> Iterator[None]:
    """Inside it, the linears and embeddings of `model` compute with weights as the export's `variant` has them."""
    with ExitStack() as hooks:
        if variant is not None:
            for module in rounded_modules(model):
                for hook in _round_in_forward(module, ROUNDED[variant]):
                    hooks.enter_context(hook)
        yield


def round_blocks(weight: Tensor, bits: int) -> Tensor:
    """The weight [N, K] as a row of `bits` codes a block of 32 gives it back, in fp32.

    A block's largest number, in magnitude, is the lowest code; the others are the nearest multiples of the step
    between codes. Blocks lie along K, whose last one may be shorter.
    """
    rows, width = weight.shape
    blocks = functional.pad(weight.float(), (0, -width % BLOCK)).view(rows, -1, BLOCK)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    half = 2 ** (bits - 1)
    step = torch.where(high.abs() > low.abs(), high, low) / -half
    codes = (blocks * torch.where(step == 0, 0, 1 / step) + half + 0.5).floor().clamp(0, 2 * half - 1)
    values: Tensor = (codes - half) * step
    return values.view(rows, -1)[:, :width]


def rounded_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose weight a variant rounds: linears (an adapted one with its parts) and the tokens' embeddings.

    Tables of positions are written as sums with constants, which no variant rounds; torch's own attention (the pooling
    of SigLIP) reads the weights of its parts without calling them, so that it stays as it is here.
    """
    tokens = model.config.get_text_config().vocab_size
    parts = {
        part
        for module in model.modules()
        if isinstance(module, (RecallLinear, nn.MultiheadAttention))
        for part in list(module.modules())[1:]
    }
    return [
        module
        for module in model.modules()
        if (isinstance(module, (RecallLinear, nn.Linear)) and module not in parts)
        or (isinstance(module, nn.Embedding) and module.num_embeddings == tokens)
    ]


def _round_in_forward(module: nn.Module, bits: int) -> Iterator[RemovableHandle]:
    """Hooks that put what the rounding changes onto the weight before a forward, and the weight itself back after it.

    Of an adapted linear this is what changes in the sum, put onto the frozen weight: the branches stay as they are.
    """
    base = module.get_base_layer() if isinstance(module, RecallLinear) else module
    own: list[nn.Parameter | None] = []

    def put(*_: object) -> None:
        weight = base.get_parameter("weight")
        with torch.no_grad():
            whole = merged_weight(module) if isinstance(module, RecallLinear) else weight
            error = (round_blocks(whole, bits) - whole.float()).to(weight.dtype)
        own.append(weight)
        base._parameters["weight"] = weight + error  # type: ignore[assignment]  # torch's functional_call does the same

    def take_back(*_: object) -> None:
        base._parameters["weight"] = own.pop()

    yield module.register_forward_pre_hook(put)
    yield module.register_forward_hook(take_back, always_call=True)
