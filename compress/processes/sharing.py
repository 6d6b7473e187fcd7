"""Work that processes share: the pieces of each, sums over all of them, and what one of them found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, distributed

_alone: ContextVar[bool] = ContextVar("_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process shares its work with no other: they do something else, or have gone."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def rank() -> int:
    """This process's number; 0 writes the files."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def count() -> int:
    """The processes that share their work with this one, and itself."""
    joined = distributed.is_available() and distributed.is_initialized() and not _alone.get()
    return distributed.get_world_size() if joined else 1


def share(pieces: int) -> range:
    """Which of so many pieces of work are this process's."""
    return range(rank(), pieces, count()) if count() > 1 else range(pieces)


def reduce(tensor: Tensor, how: str) -> None:
    """`sum`, `min` or `max` over the processes, in place."""
    if count() > 1:
        reached = _reached(tensor)
        distributed.all_reduce(reached, getattr(distributed.ReduceOp, how.upper()))
        tensor.copy_(reached)


def tell(tensor: Tensor, teller: int = 0) -> None:
    """Give all processes, in place, what the process `teller` has: where results decide what is done next, no two
    processors may have rounded them differently.
    """
    if count() > 1:
        reached = _reached(tensor).contiguous()
        distributed.broadcast(reached, teller)
        tensor.copy_(reached)


def _reached(tensor: Tensor) -> Tensor:
    """The tensor where the backend finds it: a group of the caller's may know GPUs alone."""
    backend = distributed.get_backend_config()
    return tensor.cuda() if "nccl" in backend and "gloo" not in backend else tensor


def wait_for_all() -> None:
    """Return once every process got here."""
    if not distributed.is_initialized():
        return
    if "gloo" in distributed.get_backend_config():
        distributed.all_reduce(torch.zeros(1))
    else:  # a group of the caller's
        distributed.barrier()
