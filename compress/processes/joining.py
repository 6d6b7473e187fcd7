"""One process or several: `torchrun` and `accelerate launch` say which, this joins them.

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
from slimvlm.compress.errors import SlimvlmError, UnsuitableOptionError, foreign

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
