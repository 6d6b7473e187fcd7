"""What tensors and bytes of this process hold at most while something is done."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Weighed(TorchDispatchMode):
    """Within `with`: `most` is the largest sum of what is there at once, besides what is held anyway.

    Args:
        besides: tensors that are there all the time.
    """

    def __init__(self, besides: Iterable[Tensor]) -> None:
        super().__init__()
        self.besides = {StorageWeakRef(one.untyped_storage()).cdata for one in besides if not one.is_meta}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __enter__(self) -> Self:
        tracemalloc.start()
        self.before = tracemalloc.get_traced_memory()[0]
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        tracemalloc.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = StorageWeakRef(leaf.untyped_storage())
                if storage.cdata not in self.besides:
                    self.alive[storage.cdata] = storage, leaf.untyped_storage().nbytes()
        self.alive = {key: (one, size) for key, (one, size) in self.alive.items() if not one.expired()}
        traced = tracemalloc.get_traced_memory()[0] - self.before
        self.most = max(self.most, traced + sum(size for _, size in self.alive.values()))
        return result
