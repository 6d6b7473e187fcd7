"""A file of lines that several processes add to: every line is whole, also where one of them is killed. No torch."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slimvlm.compress.files.decoding import content_of
from slimvlm.compress.files.writing import reported_as_output_errors, write_text


def read_lines(path: Path) -> list[str]:
    """The lines of a file; of one that is not there none. What a killed process left without an end is left out.

    Raises:
        OSError, ValueError: it cannot be read, or is not text.
    """
    if not path.exists():
        return []
    return content_of(path).decode().split("\n")[:-1]


def add_line(path: Path, line: str) -> None:
    """Put one line at the end, after those of all others.

    Raises:
        OutputError: it cannot be written.
    """
    with _alone(path) as descriptor:
        size = os.fstat(descriptor).st_size
        whole = os.pread(descriptor, size, 0).rfind(b"\n") + 1
        os.ftruncate(descriptor, whole)
        os.pwrite(descriptor, f"{line}\n".encode(), whole)
        os.fsync(descriptor)


def change_lines(path: Path, change: Callable[[list[str]], Iterable[str]]) -> None:
    """Put what `change` makes of all lines in their place; nobody adds one meanwhile.

    Raises:
        OutputError: it cannot be written.
    """
    with _alone(path):
        write_text(path, "".join(f"{line}\n" for line in change(read_lines(path))))


@contextmanager
def _alone(path: Path) -> Iterator[int]:
    """The open file, when nobody else adds to it; waits for that, which takes moments."""
    with reported_as_output_errors(path):
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                with suppress(OSError):  # of file systems that know no locks: go without
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    yield descriptor
                    return
            finally:
                os.close(descriptor)
