"""Models as they are computed with: on the device asked for, in a sound dtype."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar  # what torch hands to an override of its functions

import psutil
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from slimvlm.compress import processes
from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.checkpoint import Loaded, load_model, stored_types, stream_model
from slimvlm.compress.models.quantized import check_dtype, typed
from slimvlm.compress.models.streaming.lazy import Lazy, trim
from slimvlm.compress.models.streaming.shards import KINDS
from slimvlm.compress.models.streaming.weights import Holding
from slimvlm.compress.options import ComputeOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTAINER = "/sys/fs/cgroup"  # where the limits of one stand
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
    options: ComputeOptions,
    name: str,
    attention: str | None = None,
    form: str | None = None,
    beside: float | None = None,
) -> Loaded:
    """The model in the dtype to compute in, and the dtype it is stored in as `config.dtype`.

    What earlier models have left is given back to the system first.

    Args:
        form: as of `load_model`.
        beside: bytes per weight that are needed beside the weights, where the model may be one whose blocks are read
            when they are needed; `options` say whether it is. None: it is in memory.

    Raises:
        UnsuitableOptionError: a form that computes in another dtype than the options ask for.
    """
    check_dtype(form, options.dtype)
    give_back_memory()
    device = processes.pick_device(options.device)
    if beside is not None and is_to_be_streamed(options.stream, bytes_to_compute(options, name, beside), str(device)):
        loaded = stream_model(
            name,
            trust_remote_code=options.trust_remote_code,
            attention=attention,
            holding=Holding(bound=free_memory()),
        )
        _place(loaded.model, device)
    else:
        loaded = load_model(
            name,
            trust_remote_code=options.trust_remote_code,
            device=device,
            attention=attention,
            form=form,
        )
    cast(loaded.model, _compute_dtype(options.dtype, loaded.model))
    return loaded


def bytes_to_compute(options: ComputeOptions, name: str, beside: float) -> int:
    """Bytes that the weights of a model take in the dtype to compute in, and `beside` more for each of them."""
    on_cpu = processes.pick_device(options.device).type == "cpu"
    total = 0.0
    for kind, weights in stored_types(name).items():
        stored = KINDS[kind]
        dtype = _computed(options.dtype, stored, on_cpu) if stored.is_floating_point else stored
        total += weights * (dtype.itemsize + beside)
    return int(total)


def is_to_be_streamed(stream: str, bytes_needed: int, device: str = "cpu") -> bool:
    """Whether a model is read block by block: as `stream`, one of STREAM, says, or where more bytes are needed than are
    free.
    """
    return stream == "on" if stream != "auto" else bytes_needed > free_memory(device)


def require_whole(options: ComputeOptions, name: str, what: str) -> None:
    """Refuse `what` where the weights alone do not fit into memory; `--stream off` lets it try.

    Raises:
        UnsuitableOptionError: so it is.
    """
    needed, free = bytes_to_compute(options, name, 0), free_memory(str(processes.pick_device(options.device)))
    if options.stream != "off" and needed > free:
        raise UnsuitableOptionError(
            f"{what} needs all of {name} in memory, {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; slimvlm "
            "plan, apply and export read it block by block. Use these, a larger machine, or --stream off to try"
        )


def free_memory(device: str = "cpu") -> int:
    """Bytes that can be taken on a device; of the host no more than the limit leaves that a container has."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, StopIteration):
        lines = Path(CONTAINER, "memory.stat").read_text().splitlines()
        held = next(int(line.split()[1]) for line in lines if line.startswith("anon "))
        free = min(free, int(Path(CONTAINER, "memory.max").read_text()) - held)
    return free


def _place(model: PreTrainedModel, device: torch.device) -> None:
    """Move whatever is in memory of a model to a device."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, Lazy):
            tensor.data = tensor.data.to(device)


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
    trim()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights in place, but no buffer: rotary frequencies must stay in the fp32 transformers made them in."""
    for parameter in model.parameters():
        parameter.data = typed(parameter.data, dtype)
    return model


def as_stored(model: PreTrainedModel) -> PreTrainedModel:
    """`cast` to the dtype the model is stored in, which `load_to_compute` left in its config."""
    stored: Any = model.config.dtype  # a dtype once loaded
    return cast(model, stored)


def stored_bytes(model: PreTrainedModel) -> int:
    """Of a weight in the checkpoint of `model`, by its config; 2 where that does not say."""
    found: torch.dtype = getattr(torch, str(model.config.dtype).removeprefix("torch."), torch.float16)
    return found.itemsize


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
    return _computed(asked, model.dtype, model.device.type == "cpu")


def _computed(asked: str, stored: torch.dtype, on_cpu: bool) -> torch.dtype:
    """`auto` computes in the stored dtype, but in fp32 where fp16 is slow and its gradients overflow: on a CPU."""
    if asked != "auto":
        return DTYPES[asked]
    return torch.float32 if on_cpu and stored == torch.float16 else stored
