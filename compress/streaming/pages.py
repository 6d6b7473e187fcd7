"""What forwards hold while they wait: beyond a bound it is put away, and comes back where it is asked for.

A forward that waits at a block holds its inputs, its state, and what its graph has saved for the way back; hundreds of
them hold more than a memory has. The memory of a tensor can be given up and filled again while the tensor itself, and
whoever has it, stays as it is (so FSDP does with parameters). What was used least lately goes first, and every call of
a function of torch has what it is given brought back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar  # what torch hands to an override of its functions
from weakref import finalize

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from slimvlm.compress.models.streaming.lazy import Lazy, read
from slimvlm.compress.models.streaming.scratch import Scratch

KEPT = 2 * 2**30  # bytes that stay where they are; what is more goes into files, from a GPU first to host memory
LEAST = 2**16  # bytes of what is worth it
# Ask for no values.
SHARED = {"numpy", "__array__", "__dlpack__"}  # give what has the same memory, and is no tensor
UNREAD = {"__get__", "size", "dim", "numel", "stride", "__len__", "is_floating_point", "untyped_storage"}

Value = TypeVar("Value")


@dataclass(eq=False)
class _Page:
    """The memory of a tensor, and its views.

    Attributes:
        copy: of its values, if they were put away and are still the same.
    """

    size: int
    away: bool = False
    copy: Lazy | None = None


@dataclass
class _Sum:
    size: int = 0


class Pages(TorchFunctionMode):
    """The memory of the tensors that forwards make, and of others that are added. Functions are to be called within it.

    Attributes:
        bound: bytes that are in memory after `settle`; default: KEPT.
        recording: what functions make is added.
    """

    def __init__(self, bound: int | None = None) -> None:
        super().__init__()
        self.bound, self.recording = KEPT if bound is None else bound, False
        self._sum = _Sum()
        self._here: Any = WeakIdKeyDictionary()  # storage -> page, what was used last comes last
        self._away: Any = WeakIdKeyDictionary()
        self._files, self._host = Scratch(0), Scratch(self.bound)

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return self._sum.size

    def own(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """The inputs of a forward, of which the large ones are nobody else's."""
        found: dict[str, Any] = {
            name: value.clone() if isinstance(value, Tensor) and value.nbytes >= LEAST else value
            for name, value in inputs.items()
        }
        self.add(value for name, value in found.items() if value is not inputs[name])
        self.settle()
        return found

    def add(self, values: Iterable[object], seen: Iterable[object] = ()) -> None:
        """Have these tensors among what may be put away, but those that are `seen`, or share their memory."""
        others = {storage.data_ptr() for storage in _storages(seen)}
        for storage in _storages(values):
            page = self._here.pop(storage, None)
            if page is None:
                if storage.nbytes() < max(LEAST, 1) or storage.data_ptr() in others or not storage.resizable():
                    continue
                page = _Page(storage.nbytes())
                self._sum.size += page.size
                finalize(storage, _gone, self._sum, page)
            self._here[storage] = page

    def bring(self, values: Iterable[object], to_change: bool = False) -> None:
        """Have their values where they were; `to_change`: unseen, so that what was put away is not the same later."""
        for storage in _storages(values):
            page = self._away.pop(storage, None)
            if page is not None:
                storage.resize_(page.size)
                _flat(storage).copy_(read([page.copy])[0])
                page.away = False
                self._sum.size += page.size
                self._here[storage] = page
            if to_change and (page := self._here.get(storage)) is not None:
                page.copy = None

    def settle(self) -> None:
        """Put away what is more than the bound.

        Raises:
            OutputError: the disk is full.
        """
        while self._sum.size > self.bound and (storage := next(self._here.keys(), None)) is not None:
            page = self._here[storage]
            if page.copy is None:
                scratch = self._files if storage.device.type == "cpu" else self._host
                page.copy = scratch.keep(_flat(storage))
            del self._here[storage]
            self._away[storage] = page
            storage.resize_(0)
            page.away = True
            self._sum.size -= page.size

    def bring_all(self) -> None:
        """What is left now is somebody else's: a table that a module has made for later."""
        for storage in [*self._away.keys()]:
            self.bring([storage])

    def _leave(self, values: Iterable[object]) -> None:
        """Never put them away."""
        for storage in _storages(values):
            if (page := self._here.pop(storage, None)) is not None:
                self._sum.size -= page.size
                page.away = True  # is counted no more

    def pack(self, value: Tensor) -> Tensor:
        """What a graph saves."""
        self.add([value])
        return value.detach()

    def unpack(self, value: Tensor) -> Tensor:
        """It is asked for."""
        self.bring([value])
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call, with all values that it needs."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in UNREAD or not (self.recording or self._away):
            return func(*args, **kwargs)
        given = [*_tensors((args, kwargs.values()))]
        if self._away:
            self.bring(given)
        if getattr(func, "__name__", "") in SHARED:
            self._leave(given)
        versions = [_version(tensor) for tensor in given]
        result = func(*args, **kwargs)
        changed = (
            one for one, version in zip(given, versions, strict=True) if version is None or _version(one) != version
        )
        self.bring(changed, to_change=True)
        if self.recording:
            self.add([result], given)
        return result


def _gone(held: _Sum, page: _Page) -> None:
    if not page.away:
        held.size -= page.size


def _version(tensor: Tensor) -> int | None:
    """Another one after every change; None: nobody knows."""
    return None if tensor.is_inference() else tensor._version


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if not isinstance(value, Lazy) and not value.is_meta:
                yield value
        elif isinstance(value, list | tuple | type({}.values())):
            yield from _tensors(value)


def _storages(values: Iterable[object]) -> Iterator[UntypedStorage]:
    for value in values:
        if isinstance(value, UntypedStorage):
            yield value
            continue
        for tensor in _tensors([value]):
            try:
                yield tensor.untyped_storage()
            except NotImplementedError:  # stands for several, in torch.vmap
                continue


def _flat(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
