"""Two processes on one machine, that find each other through a file in their folder."""

import os
import subprocess
import sys
from pathlib import Path


def run_pair(worker: Path) -> None:
    """Run the script `worker` with its folder and the ranks 0 and 1; both must end well."""
    support = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": support, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    words = [sys.executable, str(worker), str(worker.parent)]
    workers = [subprocess.Popen([*words, str(rank)], env=environment) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=300) for process in workers] == [0, 0]
    finally:
        for process in workers:
            process.kill()
