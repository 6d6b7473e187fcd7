"""Models as they are computed with: on the device asked for, in a sound dtype."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar  # what torch hands to an override of its functions

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from slimvlm.compress import processes
from slimvlm.compress.models.checkpoint import Loaded, load_model
from slimvlm.compress.models.quantized import check_dtype, typed
from slimvlm.compress.options import ComputeOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = (torch.float16, torch.bfloat16)

Given = ParamSpec("Given")
Made = TypeVar("Made")
Thing = TypeVar("Thing")


def frees_memory(stage: Callable[Given, Made]) -> Callable[Given, Made]:
    """A stage whose models are gone when it returns, also from a GPU that other processes are to use next: modules that
    hold each other stay until they are looked for, and torch keeps what was freed.
    """

    @wraps(stage)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        made = stage(*args, **kwargs)
        if torch.cuda.is_available():
            give_back_memory()
        return made

    return run


def load_to_compute(
    options: ComputeOptions, name: str, attention: str | None = None, form: str | None = None
) -> Loaded:
    """The model in the dtype to compute in, and the dtype it is stored in as `config.dtype`.

    What earlier models have left is given back to the system first.

    Args:
        form: as of `load_model`.

    Raises:
        UnsuitableOptionError: a form that computes in another dtype than the options ask for.
    """
    check_dtype(form, options.dtype)
    give_back_memory()
    loaded = load_model(
        name,
        trust_remote_code=options.trust_remote_code,
        device=processes.pick_device(options.device),
        attention=attention,
        form=form,
    )
    cast(loaded.model, _compute_dtype(options.dtype, loaded.model))
    return loaded


def attend_as(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Has `model` compute attention as `other`, a model of the same family, does: its parts may differ in that."""
    config = other.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    asked = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    model.set_attn_implementation({"": config._attn_implementation, **asked})


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, also after an error, modes, gradients and who asks for them are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted, grad in asked:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
            if parameter.grad is not grad:
                parameter.grad = grad


def in_passes(things: Sequence[Thing], size: Callable[[Thing], int], bound: int | None) -> list[list[Thing]]:
    """Consecutive things, in every pass as many as `bound` bytes hold, one at least; None: all in one."""
    passes: list[list[Thing]] = []
    room = 0
    for thing in things:
        if not passes or (bound is not None and size(thing) > room):
            passes.append([])
            room = bound or 0
        passes[-1].append(thing)
        room -= size(thing)
    return passes


def give_back_memory() -> None:
    """Free what nobody refers to any more, also what allocators keep for later: the next model needs it elsewhere."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(
        AttributeError, OSError, TypeError
    ):  # another C library than glibc keeps little, and has no such call
        ctypes.CDLL(None).malloc_trim(0)


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights in place, but no buffer: rotary frequencies must stay in the fp32 transformers made them in."""
    for parameter in model.parameters():
        parameter.data = typed(parameter.data, dtype)
    return model


def as_stored(model: PreTrainedModel) -> PreTrainedModel:
    """`cast` to the dtype the model is stored in, which `load_to_compute` left in its config."""
    stored: Any = model.config.dtype  # a dtype once loaded
    return cast(model, stored)


class ComputedIn(TorchFunctionMode):
    """Within `with`, operations on narrower floats are done in `dtype` and give it: one weight at a time is widened.

    What a model computes so is what the whole model in that dtype computes, in the memory of the narrower one. For
    forward passes alone: what is written into a narrower tensor in place is lost.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype, self.narrower = dtype, (*HALVES, *((torch.float32,) if dtype == torch.float64 else ()))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call with wide arguments; attributes are read as they are, but a dtype as the one computed in."""
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return self._wide(func(*args, **(kwargs or {})))
        if func in (Tensor.half, Tensor.bfloat16, Tensor.float):
            return args[0].to(self.dtype)
        return func(*tree_map(self._wide, tuple(args)), **tree_map(self._wide, dict(kwargs or {})))

    def _wide(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype in self.narrower:
            return value.to(self.dtype)
        return self.dtype if isinstance(value, torch.dtype) and value in self.narrower else value


def _compute_dtype(asked: str, model: PreTrainedModel) -> torch.dtype:
    """`auto` computes in the stored dtype, but in fp32 where fp16 is slow and its gradients overflow: on a CPU."""
    if asked != "auto":
        return DTYPES[asked]
    return torch.float32 if model.device.type == "cpu" and model.dtype == torch.float16 else model.dtype
