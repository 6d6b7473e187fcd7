"""One process or several: `torchrun` and `accelerate launch` say which, this joins them.

What waits for the other processes waits on the host (gloo), where waiting may take hours: the first process cuts,
saves and evaluates alone. What computes on GPUs is exchanged between them (NCCL).
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from slimvlm.compress import errors
from slimvlm.compress.errors import SlimvlmError, UnsuitableOptionError, foreign
from slimvlm.compress.processes.watching import LEFT, NOTICED, REFUSED, TERMINATED, Watch

LAUNCH = "start several processes by torchrun or accelerate launch, or unset WORLD_SIZE for one"
PATIENCE = timedelta(days=1)  # with the work of the first process; that a process died is noticed at once
GOODBYE = timedelta(seconds=30)  # until the others have read why the first one stops


@dataclass(frozen=True)
class _Meeting:
    """The group of these processes: where words are left, this process's number, how many, who watches, and whether it
    was joined here and not by the caller.
    """

    store: distributed.Store
    me: int
    count: int
    watch: Watch
    ours: bool


_meeting: list[_Meeting] = []
_meetings = itertools.count()  # of one group of a caller's, too: what was said in an earlier one is not heard again


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this is one of the processes the launcher describes, or of those whose group the caller has joined
    already; what one of them refuses they all refuse, with the same sentence, and where one is gone the others end.
    Does nothing in a single process, and inside of another `joined`.

    Raises:
        UnsuitableOptionError: what the launcher set is wrong, or the processes do not find each other.
        ProcessLostError: one of them has ended before the job was done.
    """
    count, _ = numbered("WORLD_SIZE", 1), numbered("LOCAL_RANK", 0)  # accelerate reads that, too
    given = distributed.is_initialized()
    if (distributed.get_world_size() if given else count) < 2 or _meeting:
        yield
        return
    word: str | None = None
    try:
        if given:
            store = distributed.distributed_c10d._get_default_store()  # nothing public gives it
            _meet(store, distributed.get_rank(), distributed.get_world_size(), ours=False)
        else:
            _join(count)
        with _meeting[0].watch.raising():
            yield
        word = LEFT
    except SlimvlmError as error:
        _tell(error)
        word = REFUSED
        raise
    except RuntimeError as error:  # of a collective whose other side has gone
        why = _told() or (_meeting[0].watch.error(NOTICED) if _meeting else None)
        if why is None:
            raise
        word = LEFT
        raise why from error
    except SystemExit:
        word = TERMINATED
        raise
    finally:
        leave(word)


def leave(word: str | None = LEFT) -> None:
    """Leave the process group, if one was joined, but not one that the caller of `joined` had joined before; without a
    `word` the others take this process for lost.
    """
    meeting = _meeting.pop() if _meeting else None
    if meeting is not None and word is not None:
        meeting.watch.leave(word)
    if distributed.is_initialized() and (meeting is None or meeting.ours):
        distributed.destroy_process_group()
    if meeting is not None:
        with suppress(RuntimeError):  # the first process, which may hold the store, has gone
            meeting.store.set(f"{LEFT}/{meeting.me}", "")
            if meeting.me == 0 and not meeting.watch.lost and meeting.store.check([REFUSED]):
                meeting.store.wait([f"{LEFT}/{other}" for other in range(meeting.count)], GOODBYE)
        meeting.watch.close()


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
            _meet(found, me, count, ours=True)
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=distributed.PrefixStore("group", found),
                rank=me,
                world_size=count,
                timeout=PATIENCE,
            )
    except UnsuitableOptionError as error:
        raise (_told() or error) from None  # who refuses before the others are there has gone when they come


def _meet(found: distributed.Store, me: int, count: int, *, ours: bool) -> None:
    store = distributed.PrefixStore(f"slimvlm/{next(_meetings)}", found)
    _meeting[:] = [_Meeting(store, me, count, Watch(store, me, count, _told), ours)]


def _tell(error: SlimvlmError) -> None:
    """The first refusal counts."""
    for meeting in _meeting:
        with suppress(RuntimeError):
            meeting.store.compare_set(REFUSED, "", json.dumps([type(error).__name__, str(error)]))


def _told() -> SlimvlmError | None:
    """What a process refused."""
    for meeting in _meeting:
        with suppress(RuntimeError):
            if meeting.store.check([REFUSED]):
                name, message = json.loads(meeting.store.get(REFUSED))
                kind: type[SlimvlmError] = getattr(errors, name)
                return kind(message)
    return None
