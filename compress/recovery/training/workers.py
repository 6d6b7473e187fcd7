"""The processes of a training, by accelerate: one or several, replicated (DDP) or sharded (FSDP 2), mixed precision.

What `accelerate launch` and its configuration set in the environment decides; `torchrun` alone replicates.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from slimvlm.compress.data.questions import placed
from slimvlm.compress.errors import DeviceError, UnsuitableOptionError, foreign
from slimvlm.compress.processes import LAUNCH
from slimvlm.compress.recovery.adapters.frozen import FrozenLinear
from slimvlm.compress.recovery.distillation.distiller import Distiller

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
KNOWN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
PREPARED = "_is_accelerate_prepared"  # accelerate's own mark on a module


class Workers:
    """The model and its AdamW in this process, and what must be agreed with the others.

    Args:
        distiller: holds `student`, whose parameters that ask for gradients are trained.
        mixed_precision: `no`, `bf16` or `fp16`.
        decay: weight decay of the matrices.

    Attributes:
        model: what to call: the distiller, wrapped.
        optimizer: AdamW itself.
        trained: name in the student -> trained parameter (sharded, if they are).
        sharded: whether FSDP spreads the weights over the processes.
    """

    def __init__(self, distiller: Distiller, mixed_precision: str, decay: float) -> None:
        self.distiller = distiller
        self.accelerator = _accelerator(distiller, mixed_precision)
        self.device = self.accelerator.device
        self.count, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.sharded = self.accelerator.is_fsdp2
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.sharded:
            _require_shards(distiller)
            _name_blocks(distiller, self.accelerator.state.fsdp_plugin)
        else:
            distiller.to(self.device)
            _leave_codes(distiller)
        optimizer = adam(_trained(distiller), decay, self.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # accelerate knows no newer name
            self.model, prepared = self.accelerator.prepare(distiller, optimizer)
        # accelerate's wrapper is for scaled steps; it looks for packages on the disk in every step.
        self._scaled = prepared if self.accelerator.scaler is not None else None
        self.optimizer = optimizer
        self.trained = _trained(distiller)
        self._parameters = list(self.model.parameters())  # all: accelerate recognises a model by them
        self.dtype = next((p.dtype for p in distiller.student.parameters() if p.is_floating_point()), torch.float32)

    def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch (Any: as models take it) on the device, floats in the dtype of the student's first weight."""
        return placed(batch, self.device, self.dtype)

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around a forward and backward: gradients are exchanged only in the last one of a step."""
        return nullcontext() if last or self.count == 1 else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Gradients of this process's part of the loss; the parts of all processes add up to the loss."""
        self.accelerator.backward(loss * self.count)  # the exchange takes the mean over processes

    def clip(self, largest: float) -> Tensor:
        """Bound the norm of the gradients of all processes; what it was, a scalar."""
        norm = self.accelerator.clip_grad_norm_(self._parameters, largest or torch.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> None:
        """Change the weights; forget the gradients."""
        (self._scaled or self.optimizer).step()
        self.forget()

    def forget(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def seed(self, seed: int) -> None:
        """Seed what dropout draws from."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also note it down for a GPU not in use
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def scale(self) -> float | None:
        """By what fp16 losses are multiplied so that their gradients do not vanish; None without that."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else None

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def first_says(self, values: Sequence[float]) -> tuple[float, ...]:
        """The numbers of the first process, so that all decide alike."""
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.count > 1:
            distributed.broadcast(told, 0)
        return tuple(told.tolist())

    @contextmanager
    def usable_student(self) -> Iterator[None]:
        """The student can be called directly, in evaluation mode."""
        self.model.eval()
        if isinstance(self.model, FSDPModule):
            self.model._get_fsdp_state()._lazy_init()  # the whole model must be known as the root before a part runs
            self.model.unshard()  # what lies outside of the blocks; these gather themselves
        try:
            yield
        finally:
            if isinstance(self.model, FSDPModule):
                self.model.reshard()
            self.model.train()

    def close(self) -> None:
        """Take off what was wrapped around the distiller (sharded weights stay sharded)."""
        self.forget()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.distiller.__dict__.pop(PREPARED, None)
        self.model = self.distiller
        if self.count > 1:
            self.accelerator.free_memory()  # takes the wrapper's hooks off the weights; looks through all objects


@contextmanager
def own_accelerate() -> Iterator[None]:
    """Accelerate keeps one state per interpreter; inside it is a training's own, unless the caller has set one up."""
    theirs = is_initialized()
    try:
        yield
    finally:
        if not theirs and is_initialized():
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Matrix products inside are in `bf16` or `fp16`; `no`: in the dtype of the weights."""
    dtype = DTYPES.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def sharded() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _accelerator(distiller: nn.Module, mixed_precision: str) -> Accelerator:
    shards = sharded()
    on_cpu = next(distiller.parameters()).device.type == "cpu" and not (shards and torch.cuda.is_available())
    if mixed_precision == "fp16" and on_cpu:
        raise DeviceError("mixed precision fp16 needs a GPU; use bf16 or no on a CPU")
    with foreign("accelerate's configuration cannot be read", LAUNCH, UnsuitableOptionError):
        plugin = FullyShardedDataParallelPlugin() if shards else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise UnsuitableOptionError("this accelerate configuration asks for FSDP 1; set fsdp_version: 2 in it")
    if plugin is not None and plugin.mixed_precision_policy is None and mixed_precision in DTYPES:
        # accelerate's own would also round the loss to 16 bits, and add up gradients in them.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(DTYPES[mixed_precision], torch.float32)
    with foreign("accelerate cannot start here", LAUNCH, UnsuitableOptionError):
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision=mixed_precision,
            fsdp_plugin=plugin,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # parts are weighed here, by tokens
            # Which weights a stage reaches changes from stage to stage.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
        )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards on accelerators only; on CPUs the same code works when told so.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if accelerator.distributed_type not in KNOWN:
        raise UnsuitableOptionError(
            f"this accelerate configuration asks for {accelerator.distributed_type.value}; recovery runs on one "
            "device, on several with a copy of the models on each (multi-GPU), or with FSDP 2"
        )
    return accelerator


def _trained(distiller: Distiller) -> dict[str, nn.Parameter]:
    return {name: value for name, value in distiller.student.named_parameters() if value.requires_grad}


def adam(trained: Mapping[str, nn.Parameter], decay: float, device: torch.device) -> torch.optim.AdamW:
    """Of parameters by name. Vectors (biases, norms) do not decay; the learning rate is set before every step."""
    if not trained:
        raise UnsuitableOptionError("nothing of the student is to be trained; choose low-rank layers, projector or all")
    groups = [
        {"params": [value for value in trained.values() if value.ndim > 1], "weight_decay": decay},
        {"params": [value for value in trained.values() if value.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=device.type in ("cpu", "cuda"))


def _leave_codes(distiller: nn.Module) -> None:
    """Tell DDP to send no weights of codes, which it cannot: every process has read the same ones."""
    codes = [f"{path}.weight" for path, module in distiller.named_modules() if isinstance(module, FrozenLinear)]
    if codes:
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(distiller, codes)


def _require_shards(distiller: nn.Module) -> None:
    """FSDP takes every weight apart; a single number (the scale of CLIP's logits) has no parts."""
    if name := next((name for name, value in distiller.named_parameters() if value.ndim == 0), None):
        raise UnsuitableOptionError(
            f"the weight {name} is a single number, which accelerate's configuration (FSDP) cannot shard; start it by "
            "torchrun without that configuration"
        )


def _name_blocks(distiller: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    """Tell accelerate which modules to shard one by one, unless the user did: the blocks of student and teacher."""
    if plugin.transformer_cls_names_to_wrap is None:
        named = {name for module in distiller.children() for name in getattr(module, "_no_split_modules", None) or ()}
        present = {type(module).__name__ for module in distiller.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(named & present)
