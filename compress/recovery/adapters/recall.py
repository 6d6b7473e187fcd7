"""Low-rank recovery with weight recalling (UKMP, AAAI 2025, Eq. 12): train a little, merge exactly, keep nothing.

A cut linear gets, beside the plain low-rank branch, one that mixes the rows or columns the cut took away (W0 is the
dense weight, P and D its pruned rows and columns, R and C the kept ones, s = alpha / rank):

    rows cut:    y = W x + b + s B A drop(x) + s Bo (Ao W0[P][:, C]) x        Ao: r2 x |P|, Bo: |R| x r2
    columns cut: y = W x + b + s B A drop(x) + s (W0[R][:, D] Bi) Ai x        Ai: r2 x |C|, Bi: |D| x r2

The products in brackets are formed once per forward, so a token never meets a pruned slice and the cost is that of a
plain low-rank branch. Everything is linear in x, so it folds into W without a trace. The layer is one of peft's:
its adapter switches, adapter files and merge_and_unload work.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.models.streaming.lazy import Lazy, places_of, read_in
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.options import LowRank
from slimvlm.compress.plan import Plan
from slimvlm.compress.recovery.adapters.slices import Recalled, Slices
from slimvlm.compress.recovery.adapters.targets import check_ranks, find_targets

FACTORS = ("lora_rows_A", "lora_rows_B", "lora_columns_A", "lora_columns_B")
SLICES = ("recalled_rows", "recalled_columns")
# Any below: peft's own signatures, whose layers have their attributes at run time only, and contexts of torch.


def attach(model: nn.Module, plan: Plan, slices: Slices | None, options: LowRank) -> peft.PeftModel:
    """Gives the linears of the cut `model` trainable low-rank factors, in place; everything else is frozen.

    Outputs stay exactly what they were until the factors are trained. The factors are fp32 if the weights are bf16 or
    fp16; their start values come from torch's global generator. `get_base_model()` of the result is `model`, with every
    module where the family says.

    Args:
        slices: the pruned slices; may be None if `options.recall` is off.

    Raises:
        UnsuitableOptionError: a target matches nothing, or a rank is larger than a matrix (named).
        CheckpointError: the slices cannot be read. The model is as it was after any of these.
        ValueError: slices are needed and not given, or the model has an adapter already.
    """
    if options.recall and slices is None:
        raise ValueError("recall needs the slices of the dense checkpoint")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("the model has an adapter already; merge it first")
    paths = find_targets(model, plan.attention_unit, options.targets)
    check_ranks(model, paths, options)
    recalled = {}
    if options.recall and slices:
        recalled = {path: (slices.lazily if streamed(model) else slices.of)(path) for path in paths}
    for path, pieces in recalled.items():
        hold_slices(model.get_submodule(path), pieces)
    config = RecallConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft multiplies by it, nothing asks for an int
        lora_dropout=options.dropout,
        target_modules=paths,
        recall_rank=options.recall_rank,
    )
    config._register_custom_module({nn.Linear: RecallLinear})
    with warnings.catch_warnings():
        # peft asks transformers for this under its former name; users can do nothing about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        with _stood_in_for(model):
            adapted = peft.get_peft_model(model, config)
    assert set(recall_layers(model)) == set(paths)
    return adapted


def merge(adapted: peft.PeftModel) -> PreTrainedModel:
    """Folds the factors into the weights and removes every trace of the adapter.

    Each delta is formed in fp32, added and cast once to the dtype of its weight. Shapes, ties, classes, config and the
    record of the cut stay; parameters require gradients again, as after loading.

    Raises:
        CheckFailedError: a delta or a merged weight is not finite (the module is named); nothing has been replaced.
    """
    model = adapted.get_base_model()
    weights, made = streamed(model), list[tuple[Any, Lazy]]()
    for path, layer in recall_layers(model).items():
        own = layer.weight
        with read_in(layer, next(iter(layer.lora_A.parameters())).device), torch.no_grad():
            merged = merged_weight(layer)
            if not torch.isfinite(merged).all():
                raise CheckFailedError(
                    f"{path}: the recovered weights are not finite in {layer.weight.dtype}, so nothing was merged; "
                    "go back to an earlier state, or train with a lower learning rate"
                )
            if weights and not torch.equal(merged, layer.weight):
                made.append((own, weights.scratch.keep(merged)))
    for own, lazy in made:
        own.source = lazy.source
    whole: PreTrainedModel = adapted.unload() if weights else adapted.merge_and_unload(safe_merge=True)
    return whole.requires_grad_(True)


@contextmanager
def _stood_in_for(model: nn.Module) -> Iterator[None]:
    """For peft, which puts factors where weights are, a number stands in memory for those that are read when needed,
    meanwhile.
    """
    places = places_of(model)
    device = next(value.device for value in model.parameters() if not value.is_meta)
    for module, name, value in places:
        number = torch.zeros((), dtype=value.dtype, device=device)
        module._parameters[name] = nn.Parameter(number.expand(value.shape), requires_grad=False)
    try:
        yield
    finally:
        for module, name, value in places:
            module._parameters[name] = value


def recall_layers(model: nn.Module) -> dict[str, RecallLinear]:
    """The adapted linears of a base model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, RecallLinear)}


def merged_weight(layer: RecallLinear) -> Tensor:
    """The weight that merging will leave, [R, C]."""
    weight: Tensor = layer.weight
    for name in layer.active_adapters:
        weight = _added(weight, layer.get_delta_weight(name))
    return weight


def hold_slices(linear: nn.Module, recalled: Recalled) -> None:
    """Keeps the slices beside the weight they were cut from, as frozen parameters: they follow it to its device and are
    sharded with it, and peft, which saves what stands beside the base layer, leaves them out of adapter files."""
    for name, piece in zip(SLICES, (recalled.rows, recalled.columns), strict=True):
        if piece is not None:
            setattr(linear, name, nn.Parameter(piece.to(linear.get_parameter("weight").device), requires_grad=False))


def _added(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight.detach().to(delta.dtype) + delta).to(weight.dtype)


@dataclass
class RecallConfig(LoraConfig):
    """peft's configuration and what the recall branch needs."""

    recall_rank: int = 8


class RecallLinear(LoraLinear):
    """peft's LoRA linear with a recall branch for the slices its base layer holds."""

    adapter_layer_names = (*LoraLinear.adapter_layer_names, *FACTORS)
    lora_rows_A: nn.ModuleDict
    lora_rows_B: nn.ModuleDict
    lora_columns_A: nn.ModuleDict
    lora_columns_B: nn.ModuleDict
    in_features: int
    out_features: int

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant]]:
        return {(): RecallVariant}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        if not hasattr(self, FACTORS[0]):
            for name in FACTORS:
                setattr(self, name, nn.ModuleDict())
            self.cast_input_dtype_enabled = False  # the branches cast less, and nothing under autocast
        rows, columns = self.slices()
        if rows is not None:
            rank = min(config.recall_rank, rows.shape[0])
            self.lora_rows_A[adapter_name] = nn.Linear(rows.shape[0], rank, bias=False)
            self.lora_rows_B[adapter_name] = _zero_linear(rank, self.out_features)
        if columns is not None:
            rank = min(config.recall_rank, columns.shape[1])
            self.lora_columns_A[adapter_name] = nn.Linear(self.in_features, rank, bias=False)
            self.lora_columns_B[adapter_name] = _zero_linear(rank, columns.shape[1])
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def slices(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Pruned rows [|P|, C] and pruned columns [R, |D|] of the dense weight."""
        base = self.get_base_layer()
        return getattr(base, SLICES[0], None), getattr(base, SLICES[1], None)

    def factors(self, adapter: str) -> tuple[list[Tensor], list[Tensor]]:
        """The branches as pairs of factors: inner [rank, C] and outer [R, rank]; the first pair is the plain one."""

        def weight(factor: nn.ModuleDict) -> nn.Parameter:
            return factor[adapter].get_parameter("weight")

        inner: list[Tensor] = [weight(self.lora_A)]
        outer: list[Tensor] = [weight(self.lora_B)]
        rows, columns = self.slices()
        if rows is not None and adapter in self.lora_rows_A:
            inner.append(_Project.apply(weight(self.lora_rows_A), rows))
            outer.append(weight(self.lora_rows_B))
        if columns is not None and adapter in self.lora_columns_A:
            inner.append(weight(self.lora_columns_A))
            outer.append(_Project.apply(weight(self.lora_columns_B).T, columns.T).T)
        return inner, outer

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the factors add to the weight, [R, C], in fp32 or wider."""
        inner, outer = self.factors(adapter)
        dtype = torch.promote_types(torch.float32, inner[0].dtype)
        return torch.cat(outer, 1).to(dtype) @ torch.cat(inner).to(dtype) * float(self.scaling[adapter])

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """For peft's merge_and_unload and unload: the base layer alone, as it was before slices were given to it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        for name in SLICES:
            if hasattr(base, name):
                delattr(base, name)
        return base


class RecallVariant(LoraVariant):
    """How peft's layer computes, merges and unmerges with the recall branch."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """The factors are made in update_layer, before peft moves and casts them."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(module.lora_A[active_adapter].weight.dtype)
        inner, outer = module.factors(active_adapter)
        dropped = module.lora_dropout[active_adapter](x)
        if dropped is x or len(inner) == 1:
            hidden = functional.linear(dropped, torch.cat(inner))
        else:
            hidden = torch.cat([functional.linear(dropped, inner[0]), functional.linear(x, torch.cat(inner[1:]))], -1)
        return result + functional.linear(hidden * module.scaling[active_adapter], torch.cat(outer, 1))

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _added(orig_weight, module.get_delta_weight(active_adapter))

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = _added(orig_weight, module.get_delta_weight(active_adapter))

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return _added(orig_weight, -module.get_delta_weight(active_adapter))


class _Project(torch.autograd.Function):
    """factor @ frozen, in the dtype of the factor or of autocast; keeps the frozen matrix itself, not its cast copy."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, frozen: Tensor) -> Tensor:
        ctx.save_for_backward(frozen)
        ctx.dtype = factor.dtype
        device = factor.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else factor.dtype
        return factor.to(dtype) @ frozen.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (frozen,) = ctx.saved_tensors
        return (grad @ frozen.to(grad.dtype).T).to(ctx.dtype), None


def _zero_linear(inner: int, outer: int) -> nn.Linear:
    linear = nn.Linear(inner, outer, bias=False)
    nn.init.zeros_(linear.weight)
    return linear
