"""Models as they are computed with: on the device asked for, in a sound dtype; and how their outputs compare."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from slimvlm.compress import processes
from slimvlm.compress.data.collate import IGNORED
from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.models.checkpoint import Loaded, load_model
from slimvlm.compress.options import CompressOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of logits that should be the same, relative to the largest logit.
CHECKED_SAMPLES = 4  # so many samples two models are compared on
HALVES = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}

Given = ParamSpec("Given")
Made = TypeVar("Made")


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


def load_to_compute(options: CompressOptions, name: str, attention: str | None = None) -> Loaded:
    """The model in the dtype to compute in, and the dtype it is stored in as `config.dtype`.

    What earlier models have left is given back to the system first.
    """
    give_back_memory()
    loaded = load_model(
        name,
        trust_remote_code=options.trust_remote_code,
        device=processes.pick_device(options.device),
        attention=attention,
    )
    cast(loaded.model, _compute_dtype(options.dtype, loaded.model))
    return loaded


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
        parameter.data = parameter.data.to(dtype)
    return model


class ComputedInFloat32(TorchFunctionMode):
    """Within `with`, every operation on half precision is done in fp32 and gives fp32: one weight at a time is widened.

    What a model computes so is what the whole model in fp32 computes, in the memory of the half-precision one. For
    forward passes alone: what is written into a half-precision tensor in place is lost.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call with wide arguments; attributes are read as they are, but a dtype as the one computed in."""
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return _wide(func(*args, **(kwargs or {})))
        if func in (Tensor.half, Tensor.bfloat16):
            func = Tensor.float
        return func(*tree_map(_wide, tuple(args)), **tree_map(_wide, dict(kwargs or {})))


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in HALVES:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in HALVES else value


def outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's outputs on `batch`: logits [tokens, V], or the similarities of a dual encoder.

    Logits of padding are left out: nobody reads them, and rounding errors were seen to be 26 times larger there.
    """
    with torch.inference_mode():
        output = model(**{name: value.to(model.device) for name, value in batch.items() if name != "return_loss"})
    if hasattr(output, "logits_per_image"):
        return output.logits_per_image
    if model.config.get_text_config().is_encoder_decoder:
        real = batch["labels"] != IGNORED
    else:
        real = batch["attention_mask"].bool()
    return output.logits[real.to(output.logits.device)]


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest expected value (at least 1); NaN where a value is no number."""
    return ((expected - found).abs().max() / expected.abs().max().clamp(min=1)).item()


def reload_difference(
    saved: PreTrainedModel, reloaded: PreTrainedModel, batch: Mapping[str, Tensor], folder: Path
) -> float:
    """`relative_difference` of the outputs of a model and of what its checkpoint in `folder` gives: of the same weights
    and shapes, it is 0 where a device always adds in the same order.

    Raises:
        CheckFailedError: a weight is not bit for bit what was saved, or the outputs differ by more than rounding.
    """
    there = dict(reloaded.named_parameters())
    for name, weight in saved.named_parameters():
        if name not in there or there[name].dtype != weight.dtype or not torch.equal(weight, there[name]):
            raise CheckFailedError(f"{folder}: {name} is not reloaded as it was saved; please report this model")
    difference = relative_difference(outputs(saved, batch), outputs(reloaded, batch))
    if not difference <= TOLERANCE[saved.dtype]:
        raise CheckFailedError(
            f"{folder}: the outputs of the reloaded checkpoint differ from those of what was saved by {difference:.2e} "
            f"(relative; accepted {TOLERANCE[saved.dtype]:.0e}); please report this model"
        )
    return difference


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Norm of the difference, relative to that of what was expected; NaN where a value is no number.

    The measure of a merge, which computes the same in another order. On a badly cut model each fp32 forward was seen to
    be 6e-6 from fp64 by its largest value and 1.5e-6 by the norm; one wrong token in a thousand makes 1e-2 of the norm.
    """
    expected, found = expected.float(), found.float()
    return ((expected - found).norm() / expected.norm().clamp(min=1e-30)).item()


def _compute_dtype(asked: str, model: PreTrainedModel) -> torch.dtype:
    """`auto` computes in the stored dtype, but in fp32 where fp16 is slow and its gradients overflow: on a CPU."""
    if asked != "auto":
        return DTYPES[asked]
    return torch.float32 if model.device.type == "cpu" and model.dtype == torch.float16 else model.dtype
