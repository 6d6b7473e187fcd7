"""One process or several, and the device of each: `torchrun` and `accelerate launch` say which, this joins them.

What waits for the other processes waits on the host (gloo), where waiting may take hours: the first process cuts,
saves and evaluates alone. What computes on GPUs is exchanged between them (NCCL).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import distributed

from slimvlm.compress import errors
from slimvlm.compress.errors import DeviceError, SlimvlmError, UnsuitableOptionError, foreign

LAUNCH = "start several processes by torchrun or accelerate launch, or unset WORLD_SIZE for one"
PATIENCE = timedelta(days=1)  # with the work of the first process; that a process died is noticed at once
GOODBYE = timedelta(seconds=30)  # until the others have read why the first one stops
REFUSED, LEFT = "refused", "left"  # keys of the store

_meeting: list[tuple[distributed.Store, int, int]] = []  # of the group this module joined: words, rank, count


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this is one of the processes the launcher describes; what one of them refuses they all refuse, with the
    same sentence. Does nothing in a single process, or where the caller has joined a group already.

    Raises:
        UnsuitableOptionError: what the launcher set is wrong, or the processes do not find each other.
    """
    count, _ = numbered("WORLD_SIZE", 1), numbered("LOCAL_RANK", 0)  # accelerate reads that, too
    if count < 2 or distributed.is_initialized():
        yield
        return
    try:
        _join(count)
        yield
    except SlimvlmError as error:
        _tell(error)
        raise
    except RuntimeError as error:  # of a collective whose other side has gone
        told = _told()
        if told is None:
            raise
        raise told from error
    finally:
        leave()


def leave() -> None:
    """Leave the process group, if one was joined."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if _meeting:
        store, me, count = _meeting.pop()
        with suppress(RuntimeError):  # the first process, which may hold the store, has gone
            store.set(f"{LEFT}/{me}", "")
            if me == 0 and store.check([REFUSED]):
                store.wait([f"{LEFT}/{other}" for other in range(count)], GOODBYE)


def rank() -> int:
    """This process's number; 0 writes the files."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def wait_for_all() -> None:
    """Return once every process got here."""
    if not distributed.is_initialized():
        return
    if "gloo" in distributed.get_backend_config():
        distributed.all_reduce(torch.zeros(1))
    else:  # a group of the caller's
        distributed.barrier()


def pick_device(asked: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, ..., which becomes torch's current one: `cuda` alone, events and waits mean
    it from now on. Of several processes each takes the CUDA device of its local rank.

    Raises:
        DeviceError: the device is not there.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise DeviceError(f"device {asked!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise DeviceError(f"device {asked!r} is not available here; use --device cpu")
    index, count = numbered("LOCAL_RANK", device.index or 0), torch.cuda.device_count()
    if index >= count:
        who = f"LOCAL_RANK={index}" if os.environ.get("LOCAL_RANK") else f"device {asked!r}"
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise DeviceError(
            f"{who} asks for a GPU that is not there: this machine has {there}; choose one of these and start no more "
            "than one process for each, or use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def numbered(name: str, default: int) -> int:
    """A number that a launcher puts into the environment.

    Raises:
        UnsuitableOptionError: it is none.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,6}", text):
        raise UnsuitableOptionError(f"the environment says {name}={text[:40]!r}, which is no number; {LAUNCH}")
    return int(text)


def _join(count: int) -> None:
    me = numbered("RANK", count)
    if me >= count:
        said = os.environ.get("RANK", "nothing")
        raise UnsuitableOptionError(f"the environment says RANK={said}, which is no number below {count}; {LAUNCH}")
    try:
        with foreign("the processes find no other", LAUNCH, UnsuitableOptionError):
            found, _, _ = next(distributed.rendezvous("env://", me, count, timeout=timedelta(minutes=5)))
            _meeting[:] = [(distributed.PrefixStore("slimvlm", found), me, count)]
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=distributed.PrefixStore("group", found),
                rank=me,
                world_size=count,
                timeout=PATIENCE,
            )
    except UnsuitableOptionError as error:
        raise (_told() or error) from None  # who refuses before the others are there has gone when they come


def _tell(error: SlimvlmError) -> None:
    """The first refusal counts."""
    for store, _, _ in _meeting:
        with suppress(RuntimeError):
            store.compare_set(REFUSED, "", json.dumps([type(error).__name__, str(error)]))


def _told() -> SlimvlmError | None:
    """What a process refused."""
    for store, _, _ in _meeting:
        with suppress(RuntimeError):
            if store.check([REFUSED]):
                name, message = json.loads(store.get(REFUSED))
                kind: type[SlimvlmError] = getattr(errors, name)
                return kind(message)
    return None
