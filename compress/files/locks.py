"""One writer of a folder or file at a time: a lock that says who holds it, and that ends with its holder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from slimvlm.compress.errors import InUseError
from slimvlm.compress.files.decoding import MisfitError, decode, parse
from slimvlm.compress.files.writing import reported_as_output_errors

LOCK = ".lock"
LONGEST = 1000  # bytes of what a holder says of itself
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems that know none

_held = threading.local()  # what a thread holds it may lock again


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: process id, name of the machine, and since when."""

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def locked_folder(folder: Path, what: Path | None = None) -> Iterator[None]:
    """Hold a folder until the block ends; it is made if it is not there, and goes again if nothing is put into it.

    The lock is the system's (flock) and ends with the process, however that ends: none is ever left behind. Where the
    file system knows none (some that hosts share), the file is the lock: one that a killed process left on this host is
    taken over, for those of other hosts the message names the file.

    Args:
        what: named in messages instead of `folder`.

    Raises:
        InUseError: another process holds it (named).
        OutputError: nothing can be written there.
    """
    folder = Path(os.path.realpath(folder))
    with reported_as_output_errors(folder):
        was_there = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / LOCK, what or folder):
            yield
    finally:
        if not was_there:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """As `locked_folder`, for a file that is to be written."""
    path = Path(os.path.realpath(path))
    with _locked(path.with_name(f".{path.name}{LOCK}"), path):
        yield


@contextmanager
def _locked(lock: Path, what: Path) -> Iterator[None]:
    holding: set[Path] = _held.__dict__.setdefault("locks", set())
    if lock in holding:
        yield
        return
    descriptor = _acquire(lock, what)
    holding.add(lock)
    try:
        yield
    finally:
        holding.remove(lock)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock: Path, what: Path) -> int:
    while True:
        with reported_as_output_errors(what):
            descriptor, made = _opened(lock)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS or not (made or _left_behind(lock)):
                said = os.pread(descriptor, LONGEST, 0)
                os.close(descriptor)
                holder = _holder(said) or "another process"
                ended = f" (or remove {lock}, if that has ended)" if error.errno in NO_LOCKS else ""
                raise InUseError(
                    f"{what} is in use by {holder}; wait until it is done{ended}, or choose another name"
                ) from None
        if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
            break
        os.close(descriptor)  # of a holder that took it away just now, or that is gone
    me = Holder(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(" ", "seconds"))
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(me)).encode(), 0)
    return descriptor


def _opened(lock: Path) -> tuple[int, bool]:
    """The file, and whether it was made by this process, which it is by one alone."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(lock, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(lock, flags, 0o666), False


def _left_behind(lock: Path) -> bool:
    """Whether the file was of a process of this host that is gone: then it is no more. Renamed first, which of several
    processes one can.
    """
    aside = lock.with_name(f"{lock.name}.{os.getpid()}")
    with suppress(OSError):
        holder = _holder(lock.read_bytes()[:LONGEST])
        if holder is None or holder.host != socket.gethostname() or _runs(holder.pid):
            return False
        lock.rename(aside)
        if _holder(aside.read_bytes()[:LONGEST]) == holder:
            aside.unlink()
            return True
        aside.rename(lock)  # of one that took it over just now
    return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def holder_of(folder: Path) -> int | None:
    """The process id in the lock of a folder, also where that process was killed; None where nobody holds it."""
    lock = folder / LOCK
    holder = _holder(lock.read_bytes()[:LONGEST]) if lock.is_file() else None
    return None if holder is None else holder.pid


def _holder(said: bytes) -> Holder | None:
    try:
        return decode(parse(said), Holder)
    except MisfitError:
        return None
