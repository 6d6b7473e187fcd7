"""`torch.cuda` for two pretended devices (see `pretended`): what the product and the libraries under it ask of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pretended
import torch
from pretended import COUNT, Devices, Pretended, current, index_of, kept

MEMORY = 8 << 30


def number(device: Any = None) -> int:
    found = index_of("cuda" if device is None else device)
    assert found is not None
    return found


def allocated(device: Any = None) -> int:
    """Bytes of the tensors that Python knows."""
    index = number(device)
    storages = {}
    for found in gc.get_objects():
        if type(found) is Pretended and found._index == index:
            with torch._C.DisableTorchFunctionSubclass():
                storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _reserved(device: Any = None) -> int:
    """With what torch keeps: at least the largest tensor that came there since the cache was emptied."""
    return max(allocated(device), kept[number(device)])


def _exchange(device: int) -> int:
    before = current[0]
    if device >= 0:
        current[0] = number(device)
    return before


def _set_device(device: Any) -> None:
    current[0] = number(device)


def _empty_cache() -> None:
    kept[:] = [0] * COUNT


class Stream:
    """Everything is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def synchronize(self) -> None:
        pretended.wait("synchronize")

    def wait_stream(self, _: Any) -> None: ...


def _properties(device: Any = None) -> Any:
    return SimpleNamespace(
        name=f"pretended {number(device)}", major=9, minor=0, total_memory=MEMORY, multi_processor_count=2, uuid="0",
        L2_cache_size=1 << 20, warp_size=32,
    )  # fmt: skip


FUNCTIONS = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "_lazy_init": lambda: None,
    "_lazy_call": lambda *_, **__: None,
    "device_count": lambda: COUNT,
    "current_device": lambda: current[0],
    "set_device": _set_device,
    "_exchange_device": _exchange,
    "_maybe_exchange_device": _exchange,
    "get_device_properties": _properties,
    "get_device_name": lambda device=None: _properties(device).name,
    "get_device_capability": lambda device=None: (number(device), (9, 0))[1],
    "is_bf16_supported": lambda including_emulation=True: True,
    "mem_get_info": lambda device=None: (MEMORY - allocated(device), MEMORY),
    "memory_allocated": allocated,
    "max_memory_allocated": allocated,
    "memory_reserved": _reserved,
    "max_memory_reserved": _reserved,
    "reset_peak_memory_stats": lambda device=None: number(device) and None,
    "empty_cache": _empty_cache,
    "synchronize": lambda device=None: (number(device), pretended.wait("synchronize"))[0] and None,
    "current_stream": lambda device=None: Stream(),
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: torch.zeros(number(device) + 1, dtype=torch.uint8),
    "set_rng_state": lambda state, device=None: number(device) and None,
    "Stream": Stream,
    "stream": lambda stream: nullcontext(),
    "is_current_stream_capturing": lambda: False,
}
PLAIN_AUTOCAST = torch.amp.autocast_mode.autocast.__init__


def _autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
    """The CPU's, since the CPU's kernels run."""
    PLAIN_AUTOCAST(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _grouped(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
    """As torch._C's, by the devices that Python sees."""
    groups: dict[Any, Any] = {}
    for place, first in enumerate(lists[0]):
        found, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for column, tensors in zip(found, lists, strict=True):
            column += tensors[place : place + 1]  # a list may be empty
        indices.append(place)
    return groups


@contextmanager
def two_devices() -> Iterator[None]:
    """Two CUDA devices are there, and no other process sees them."""
    pretended.waits.clear()
    current[0], kept[:] = 0, [0] * COUNT
    with (
        patch.multiple(torch.cuda, **FUNCTIONS),
        patch.object(torch.amp.autocast_mode.autocast, "__init__", _autocast),
        patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped),
        patch("transformers.modeling_utils.caching_allocator_warmup", lambda *_: None),  # asks for memory often
        patch.dict("os.environ", {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),  # the mode is this thread's
        Devices(),
    ):
        gc.collect()
        gc.freeze()  # what is there before is not looked through
        yield
