"""Tensors that are read when their values are needed: they know their shape, and how they are made of files.

A lazy tensor is one of the meta device. What is asked of it alone, or with indices, is noted: `weight[rows] * scale` is
again lazy, and reads as what it says. Where it meets other values (the inputs of a linear), or its values are asked for
(`tolist`, `equal`, a move to a device), it is read, used, and forgotten. So whatever works on the sizes of a model, or
on one weight after the other, works on a model that does not fit into memory as it is: cutting, saving, comparing, and
a forward pass without gradients, one weight in memory at a time.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

REFUSED = (RuntimeError, TypeError)  # what the meta device says of what needs values
CHOOSING = (Tensor.__getitem__, Tensor.index_select)  # take indices that are there
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
SAME = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]  # the same values


class Source:
    """Where values come from."""

    parents: tuple[Source, ...] = ()

    def make(self, values: Sequence[Any]) -> Any:
        """The values; `values`: those of the parents."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Held(Source):
    """A tensor in memory."""

    tensor: Tensor

    def make(self, values: Sequence[Any]) -> Tensor:
        return self.tensor


class Made(Source):
    """What a function gives.

    Args:
        function: of torch.
        given: its (arguments, named arguments), with sources in the place of lazy tensors.
        changed: whether it changes its first argument, and that is what is made.
    """

    def __init__(self, function: Callable[..., Any], given: tuple[Any, Any], changed: bool = False) -> None:
        self.function, self.changed = function, changed
        leaves, self.form = tree_flatten(given)
        self.leaves = [None if isinstance(leaf, Source) else _where_values_are(leaf) for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Source)]
        self.parents = tuple(leaf for leaf in leaves if isinstance(leaf, Source))

    @torch.no_grad()
    def make(self, values: Sequence[Any]) -> Any:
        leaves = list(self.leaves)
        for place, value in zip(self.places, values, strict=True):
            leaves[place] = value
        args, kwargs = tree_unflatten(leaves, self.form)
        if not self.changed:
            return self.function(*args, **kwargs)
        own = args[0].clone()
        self.function(own, *args[1:], **kwargs)
        return own


@dataclass(frozen=True, eq=False)
class Part(Source):
    """One of several tensors that a function gives."""

    whole: Source
    number: int

    @property
    def parents(self) -> tuple[Source, ...]:  # type: ignore[override]
        return (self.whole,)

    def make(self, values: Sequence[Any]) -> Tensor:
        part: Tensor = values[0][self.number]
        return part


class Lazy(Tensor):
    """See above. `source` says how it is made."""

    source: Source

    @classmethod
    def of(cls, source: Source, like: Tensor) -> Lazy:
        """As `source` makes it; `like`: a meta tensor of its shape and dtype."""
        made: Lazy = Tensor._make_subclass(cls, like)
        made.source = source
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            copied: Tensor = Lazy.of(self.source, torch.empty_like(self))
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Note the call, or carry it out with values."""
        kwargs = kwargs or {}
        name: str = getattr(func, "__name__", "")
        first: Any = args[0] if args else None
        changes = isinstance(first, Lazy) and (name == "__setitem__" or (name.endswith("_") and name[-2:] != "__"))
        leaves = tree_leaves((args, kwargs)) if name not in ("__get__", "__set__") else []
        noted = changes or func in CHOOSING
        if _leaves_meta(func, leaves) or (not noted and any(map(_is_real, leaves))):
            return _carry_out(func, args, kwargs)
        try:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **kwargs)
        except REFUSED:
            return _carry_out(func, args, kwargs)
        if func == SET_DATA:
            first.source = args[1].source
        elif changes and func is Tensor.copy_ and args[1].shape == first.shape:
            first.source = _held(args[1].detach().to(first.dtype))
        elif changes and name != "requires_grad_":
            first.source = Made(func, tree_map(_source_of, (tuple(args), kwargs)), changes)
        elif func in SAME:
            return Lazy.of(first.source, result)
        elif name != "__set__" and any(isinstance(one, Tensor) for one in _each(result)):
            return _noted(Made(func, tree_map(_source_of, (tuple(args), kwargs))), result)
        return result


def read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The values, on the CPU unless they were made elsewhere; of tensors that are not lazy, they themselves. What
    several are made of is read once, and nothing stays longer than it is needed.
    """
    wanted = [_source_of(tensor) for tensor in tensors]
    order: dict[Source, None] = {}
    for source in wanted:
        if isinstance(source, Source):
            _order(source, order)
    uses = Counter(source for source in wanted if isinstance(source, Source))
    uses.update(parent for source in order for parent in source.parents)
    values: dict[Source, Any] = {}
    with torch._C.DisableTorchFunction():  # values are what they are, whatever is computed in
        for source in order:
            values[source] = source.make([values[parent] for parent in source.parents])
            for parent in source.parents:
                uses[parent] -= 1
                if not uses[parent]:
                    values.pop(parent, None)
    found = (values[source] if isinstance(source, Source) else source for source in wanted)
    return [
        value.contiguous() if tensor.is_contiguous() else value for tensor, value in zip(tensors, found, strict=True)
    ]


def places_of(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """All lazy parameters in `module`: who has it, what it is called there, and itself."""
    return [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and isinstance(parameter, Lazy)
    ]


@contextmanager
def read_in(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The lazy parameters of `module` are in memory meanwhile, read at once: what several are made of, once."""
    places = places_of(module)
    values = read([parameter for _, _, parameter in places])
    for (owner, name, _), value in zip(places, values, strict=True):
        owner._parameters[name] = nn.Parameter(value.to(device), requires_grad=False)
    del values
    try:
        yield
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter


def trim() -> None:
    """Give back to the system what was freed: the C library keeps gigabytes of what large tensors leave."""
    with suppress(AttributeError, OSError, TypeError):  # another one than glibc keeps little, and has no such call
        ctypes.CDLL(None).malloc_trim(0)


def _order(source: Source, order: dict[Source, None]) -> None:
    """Put what it is made of before it."""
    if source not in order:
        for parent in source.parents:
            _order(parent, order)
        order[source] = None


def _where_values_are(leaf: Any) -> Any:
    """The CPU in the place of the meta device, on which a lazy tensor is asked to stay: `to("meta", dtype)`."""
    on_meta = isinstance(leaf, str | torch.device) and str(leaf) == "meta"
    return torch.device("cpu") if on_meta else leaf


def _source_of(value: Any) -> Any:
    return value.source if isinstance(value, Lazy) else value


def _held(value: Tensor) -> Source:
    return value.source if isinstance(value, Lazy) else Held(value.clone())


def _is_real(leaf: Any) -> bool:
    """Whether it is a tensor with values."""
    return isinstance(leaf, Tensor) and not isinstance(leaf, Lazy) and not leaf.is_meta


def _leaves_meta(func: Any, leaves: Sequence[Any]) -> bool:
    """Whether a lazy tensor is asked to be on a device, where it has values."""
    devices = [leaf for leaf in leaves if isinstance(leaf, str | torch.device)] if func is Tensor.to else []
    return any(torch.device(device).type != "meta" for device in devices)


def _carry_out(func: Any, args: Any, kwargs: Any) -> Any:
    """Call with values, where the numbers are that they meet."""
    leaves, form = tree_flatten((tuple(args), kwargs))
    device = next((leaf.device for leaf in leaves if _is_real(leaf)), torch.device("cpu"))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Lazy)]
    for place, value in zip(places, read([leaves[place] for place in places]), strict=True):
        leaves[place] = value.to(device)
    args, kwargs = tree_unflatten(leaves, form)
    return func(*args, **kwargs)


def _noted(made: Source, result: Any) -> Any:
    """The result of a call on meta tensors, its tensors lazy."""
    if isinstance(result, Tensor):
        return Lazy.of(made, result) if type(result) is Tensor and result.is_meta else result
    if isinstance(result, tuple | list):
        return type(result)([_noted(Part(made, number), one) for number, one in enumerate(result)])
    return result


def _each(result: Any) -> Sequence[Any]:
    return result if isinstance(result, tuple | list) else (result,)
