"""Work that processes share: the pieces of each, sums over all of them, and what one of them found."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.files.writing import file_digest

LONGEST = 60  # characters of a value in a message
VISIBLE = 30.0  # seconds until a file that one host wrote is seen by all: NFS remembers for a while what was not there

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


def require_same(facts: Mapping[str, object], advice: str) -> None:
    """All processes must know these as the first one does; who does not is named, by all.

    Raises:
        UnsuitableOptionError: the first difference, with the `advice`.
    """
    if count() == 1:
        return
    mine = {name: str(value) for name, value in facts.items()}
    first = _said(mine, 0)
    different = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
    reduce(who := torch.tensor(rank() if different else count()), "min")
    if int(who) == count():
        return
    mine_of_it = [socket.gethostname(), different[0], mine.get(different[0])] if different else []
    host, name, value = _said(mine_of_it, int(who))
    theirs, ours = _shortened(name, value), _shortened(name, first.get(name))
    raise UnsuitableOptionError(f"process {int(who)} on {host} has {theirs}, and process 0 has {ours}; {advice}")


def require_shared(path: Path) -> None:
    """All processes must see the file that the first one wrote, where a file system may show it a little later.

    Raises:
        UnsuitableOptionError: one does not.
    """
    if count() == 1:
        return
    wanted = _said(_digest(path), 0)
    until = time.monotonic() + VISIBLE
    while (seen := _digest(path)) != wanted and time.monotonic() < until:
        time.sleep(0.2)
    facts = {} if seen is None else {str(path): seen}
    require_same(facts, "all need the same folder, on a disk they share")


def _digest(path: Path) -> str | None:
    with suppress(OSError):
        return file_digest(path)
    return None


def _said(fact: Any, teller: int) -> Any:
    """JSON (Any) that one process has."""
    text = json.dumps(fact).encode() if rank() == teller else b""
    tell(size := torch.tensor(len(text)), teller)
    tell(letters := torch.tensor(list(text) or [0] * int(size), dtype=torch.uint8), teller)
    return json.loads(bytes(letters.tolist()))


def _shortened(name: str, value: str | None) -> str:
    return f"no {name}" if value is None else f"{name} = {value if len(value) <= LONGEST else value[:LONGEST] + '...'}"


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
