"""Two processes that are one job."""

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from forked import Forked


def run_pair(folder: Path, first: Sequence[object], second: Sequence[object] = (), **environment: str) -> list[Forked]:
    """Run the words `first` as rank 0 and the words `second`, if none the same, as rank 1 until both have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **environment}
    with ExitStack() as running:
        pair = [
            running.enter_context(Forked(folder, *words, RANK=rank, LOCAL_RANK=rank, **shared))
            for rank, words in (("0", first), ("1", second or first))
        ]
        for process in pair:
            process.wait()
    return pair


def assert_done(pair: list[Forked]) -> None:
    """Both ended well."""
    for process in pair:
        assert process.returncode == 0, process.stderr.read_text()[-3000:]
