"""Several processes that are one job."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from forked import Forked


@contextmanager
def started(folder: Path, *words: Sequence[object], **environment: str) -> Iterator[list[Forked]]:
    """A process for each of these words, as the ranks 0, 1, ...; those that still run at the end are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(len(words))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **environment}
    with ExitStack() as running:
        yield [
            running.enter_context(Forked(folder, *given, RANK=str(rank), LOCAL_RANK=str(rank), **shared))
            for rank, given in enumerate(words)
        ]


def run_together(folder: Path, count: int, words: Sequence[object], **environment: str) -> list[Forked]:
    """Run the words in so many processes until all have ended."""
    return _ended(folder, *[words] * count, **environment)


def run_pair(folder: Path, first: Sequence[object], second: Sequence[object] = (), **environment: str) -> list[Forked]:
    """Run the words `first` as rank 0 and the words `second`, if none the same, as rank 1 until both have ended."""
    return _ended(folder, first, second or first, **environment)


def _ended(folder: Path, *words: Sequence[object], **environment: str) -> list[Forked]:
    with started(folder, *words, **environment) as processes:
        for process in processes:
            process.wait()
    return processes


def assert_done(processes: Sequence[Forked]) -> None:
    """All ended well."""
    for process in processes:
        assert process.returncode == 0, process.stderr.read_text()[-3000:]
