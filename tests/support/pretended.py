"""A pretended CUDA device: tensors that say `cuda:N`, compute on the CPU, and behave to Python as CUDA's do.

What the device is a matter of is checked where Python calls torch: tensors of two devices do not mix (a CPU scalar may
be an operand), a tensor of the device is no NumPy array, what is made without a device is on the CPU, `cuda` alone is
the current device. Whatever makes the host wait for the device is noted down: reading a value, a size that depends on
values, a copy from or to pageable memory that was not said to be non-blocking.

Below Python nothing knows of it: autograd, fused kernels and storages are the CPU's, so hooks, optimisers and
safetensors work as they are, and Triton's interpreter reads the real memory. What C++ would tell of a device it does
not tell: CUDA's own autocast (the CPU's is used), streams, the engine's threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import slimvlm

COUNT = 2  # devices
OURS = str(Path(slimvlm.__file__).resolve().parent)
UNSEEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "contextlib.py", "functools.py")
# Reading a value, or a size that depends on values; solving looks at what went wrong.
READERS = {
    *("item", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "allclose"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "is_nonzero"),
    *("linalg_solve", "linalg_inv", "linalg_cholesky", "linalg_svd"),
}
FREE_TO_MIX = {"_has_compatible_shallow_copy_type", "is_same_size", "__set__", "backward", "result_type"}
current = [0]  # the current device
kept = [0] * COUNT  # bytes that torch would keep for later, at least


@dataclass(frozen=True)
class Wait:
    """One wait for the device: what was called, and the innermost place outside of torch that called it."""

    what: str
    place: str
    ours: bool


waits: list[Wait] = []


def wait(what: str) -> None:
    """Note that the host waits for the device."""
    frame = sys._getframe(1)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in UNSEEN):
        frame = frame.f_back
    file = frame.f_code.co_filename
    waits.append(Wait(what, f"{file}:{frame.f_lineno}", _is_ours(file)))


@cache
def _is_ours(file: str) -> bool:
    inside = str(Path(file).resolve()).removeprefix(OURS)
    return inside != file and not inside.startswith(("/tests/", "/.venv/")) and "site-packages" not in file


class Pretended(torch.Tensor):
    """A tensor of the pretended device `_index`; the memory is the host's."""

    _index: int
    device = property(lambda self: torch.device("cuda", self._index))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return self._index

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index = next(leaf._index for leaf in _tensors(args, kwargs or {}) if isinstance(leaf, Pretended))
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                return _labelled(out, index) if type(out) is torch.Tensor else out
            return tree_map(lambda leaf: _labelled(leaf, index) if type(leaf) is torch.Tensor else leaf, out)


class Devices(TorchFunctionMode):
    """Within it, what is asked for on a CUDA device is made on the pretended one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def index_of(device: Any) -> int | None:
    """Number of the pretended device; None for the CPU.

    Raises:
        RuntimeError: there is no such device.
    """
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise NotImplementedError(f"device {device}")
    index = current[0] if device.index is None else device.index
    if index >= COUNT:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return index


def place_of(tensor: torch.Tensor) -> int | None:
    return tensor._index if isinstance(tensor, Pretended) else None


def moved(tensor: torch.Tensor, index: int | None) -> torch.Tensor:
    """A copy on another device; gradients come back."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Move.apply(tensor, index)
    copy = torch.empty_like(_plain(tensor)).copy_(_plain(tensor))
    if index is None:
        return copy
    kept[index] = max(kept[index], copy.nbytes)
    return _labelled(copy, index)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, index: int | None) -> torch.Tensor:
        ctx.before = place_of(tensor)
        return moved(tensor.detach(), index)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return moved(grads[0], ctx.before), None


def _labelled(tensor: torch.Tensor, index: int) -> Pretended:
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        found = torch.Tensor._make_subclass(Pretended, tensor)
    found._index = index
    return found


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of the CPU, without a graph."""
    if not isinstance(tensor, Pretended):
        return tensor.detach()
    with torch._C.DisableTorchFunctionSubclass():
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), offset, size, stride)


# ---------------------------------------------------------------- calls of torch from Python


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One call of torch, as it would go with this device."""
    name = getattr(func, "__name__", "")
    if name in HANDLERS:
        return HANDLERS[name](func, args, kwargs)
    if name == "__get__":  # an attribute has one operand
        return _run(func, args, kwargs, place_of(args[0]))
    here = _common(name, args, kwargs)
    if "device" in kwargs and kwargs["device"] is not None and torch.device(kwargs["device"]).type != "meta":
        return _made_on(func, args, kwargs)
    if here is not None and (name in READERS or (name == "where" and len(args) == 1)):
        wait(name)
    if here is not None and name == "repeat_interleave" and kwargs.get("output_size") is None:
        wait(name)
    return _run(func, args, kwargs, here)


def _common(name: str, args: Any, kwargs: Any) -> int | None:
    """The device of all operands; CPU scalars fit to any.

    Raises:
        RuntimeError: there are several.
    """
    tensors = _tensors(args, kwargs)
    places = {place_of(tensor) for tensor in tensors if isinstance(tensor, Pretended) or _counts(tensor)}
    if len(places) > 1 and name not in FREE_TO_MIX:
        names = " and ".join("cpu" if place is None else f"cuda:{place}" for place in places)
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {names}! (in {name})")
    return next((place for place in places if place is not None), None)


def _tensors(args: Any, kwargs: Any = None) -> list[torch.Tensor]:
    """Those among the arguments, also in lists and tuples."""
    found: list[torch.Tensor] = []
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += _tensors(value)
    return found


def _counts(tensor: torch.Tensor) -> bool:
    return tensor.ndim > 0 and not tensor.is_meta


def _run(func: Any, args: Any, kwargs: Any, index: int | None) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)
        if index is None or isinstance(out, torch.Size) or not isinstance(out, torch.Tensor | tuple | list):
            return out
        given = _tensors(args, kwargs)
        if isinstance(out, torch.Tensor):
            return _labelled(out, index) if _is_new(out, given) else out
        return tree_map(lambda leaf: _labelled(leaf, index) if _is_new(leaf, given) else leaf, out)


def _is_new(leaf: Any, given: list[torch.Tensor]) -> bool:
    return type(leaf) is torch.Tensor and not any(leaf is other for other in given) and not leaf.is_meta


def _made_on(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    index = index_of(kwargs["device"])
    if func in (torch.tensor, torch.as_tensor, torch.asarray):
        if isinstance(args[0], torch.Tensor):
            return _to(None, args[:1], kwargs)
        if index is not None:
            wait("copy to the device")
    made = _run(func, args, kwargs | {"device": "cpu"}, None)
    return made if place_of(made) == index else moved(made, index).requires_grad_(made.requires_grad)


def _to(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensor, args = args[0], list(args[1:])
    kwargs = {name: value for name, value in kwargs.items() if name != "copy" or value}
    if args and isinstance(args[0], torch.Tensor):
        args[:1] = [args[0].device, args[0].dtype]
    elif isinstance(kwargs.get("other"), torch.Tensor):
        other = kwargs.pop("other")
        args = [other.device, other.dtype, *args]
    copy = kwargs.pop("copy", False)
    device, dtype, lazy, layout = torch._C._nn._parse_to(*args, **kwargs)
    rest = {"dtype": dtype or tensor.dtype, "copy": copy} | ({"memory_format": layout} if layout else {})
    if tensor.is_meta or (device is not None and device.type == "meta"):
        return _run(torch.Tensor.to, (tensor,), rest | ({"device": device} if device is not None else {}), None)
    here = place_of(tensor)
    there = here if device is None else index_of(device)
    if here != there:
        if not lazy and None in (here, there):
            wait("copy from the device" if there is None else "copy to the device")
        tensor = moved(tensor, there)
    return _run(torch.Tensor.to, (tensor,), rest, there)


def _copy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    target, source = args[0], args[1]
    here, there = place_of(source), place_of(target)
    if here != there and not (target.is_meta or source.is_meta):
        lazy = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if None in (here, there) and not (lazy and there is not None):
            wait("copy from the device" if there is None else "copy to the device")
        args = (target, moved(source, there), *args[2:])
    return _run(func, args, kwargs, None)


def _index(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`__getitem__` and `__setitem__`: indices may be on the CPU, a value may be anywhere."""
    target, key, *value = args
    here = place_of(target)

    def fitting(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if place_of(leaf) not in (None, here):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({here})")
        masks = leaf.dtype in (torch.bool, torch.uint8)
        filled = value and (not isinstance(value[0], torch.Tensor) or value[0].ndim == 0)
        if here is not None and leaf.ndim and masks and not filled:
            wait("boolean index")
        elif here is not None and not isinstance(leaf, Pretended) and leaf.ndim:
            wait("index from the host")
        return leaf if here is None or isinstance(leaf, Pretended) else moved(leaf, here)

    key = tree_map(fitting, key)
    if here is not None and any(isinstance(part, list) for part in (key if isinstance(key, tuple) else (key,))):
        wait("index from the host")
    if value and isinstance(value[0], torch.Tensor) and place_of(value[0]) != here:
        if None in (here, place_of(value[0])) and not (here is not None and value[0].ndim == 0):
            wait("copy")
        value = [moved(value[0], here)]
    return _run(func, (target, key, *value), kwargs, here)


def _set(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A tensor whose `data` is put on another device becomes one of that device, and stays the same object."""
    if getattr(func.__self__, "__name__", "") == "data" and place_of(args[0]) != place_of(args[1]):
        parameter, value = args
        new = torch.nn.Parameter(value.detach(), parameter.requires_grad)
        extra = {name: item for name, item in vars(parameter).items() if name not in ("_index", "_is_param")}
        with torch._C.DisableTorchFunctionSubclass():
            torch.utils.swap_tensors(parameter, new)
        vars(parameter).update(extra)
        return None
    return _run(func, args, kwargs, None)


def _refused(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], Pretended):
        raise TypeError(f"can't convert {args[0].device} device type tensor to numpy. Use Tensor.cpu() first")
    return _run(func, args, kwargs, None)


def _list(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], Pretended):
        wait("tolist")
    return _plain(args[0]).tolist()


def _backward(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """With the devices in force again: hooks run in it."""
    roots = args[0] if isinstance(args[0], tuple | list) else (args[0],)
    assert all(root.numel() == 1 for root in roots) and not kwargs.get("gradient")
    retain, create, inputs = (kwargs.get(name) for name in ("retain_graph", "create_graph", "inputs"))
    ones = tuple(torch.ones_like(root) for root in roots)
    with Devices():
        torch.autograd.graph._engine_run_backward(
            tuple(roots), ones, bool(retain), bool(create), inputs or (), allow_unreachable=True, accumulate_grad=True
        )


def _cuda(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    device = args[1] if len(args) > 1 else kwargs.get("device")
    lazy = bool(kwargs.get("non_blocking"))
    return _to(None, (args[0], "cuda" if device is None else device), {"non_blocking": lazy})


HANDLERS: dict[str, Callable[..., Any]] = {
    "to": _to,
    "cpu": lambda _, args, kwargs: _to(None, (args[0], "cpu"), {}),
    "cuda": _cuda,
    "type_as": lambda _, args, kwargs: _to(None, args, kwargs),
    "copy_": _copy,
    "__getitem__": _index,
    "__setitem__": _index,
    "__set__": _set,
    "tolist": _list,
    "numpy": _refused,
    "__array__": _refused,
    "pin_memory": lambda _, args, kwargs: args[0],
    "is_pinned": lambda _, args, kwargs: False,
    "backward": _backward,
}
