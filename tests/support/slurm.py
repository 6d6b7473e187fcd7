"""A Slurm cluster of two nodes on this machine, with a key, ports and folders of its own; run as root where Slurm is
installed (Debian: `apt-get install slurm-wlm`).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("127.0.0.1", "127.0.0.2")  # names that lead here on every Linux
STARTS, RUNS = 30.0, 120.0  # seconds that the nodes may take to be there, and a job
CONFIGURATION = """
ClusterName=local
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName={nodes[0]} Port={ports[1]} CPUs={cores}
NodeName={nodes[1]} Port={ports[2]} CPUs={cores}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"{lacking[0]} is not installed" if lacking else None if os.geteuid() == 0 else "only root may start slurmd"


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Its two nodes take jobs; SLURM_CONF is set meanwhile."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    cores, name = os.cpu_count(), socket.gethostname()
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(folder=folder, name=name, nodes=NODES, ports=_ports(3), cores=cores), encoding="utf-8"
    )
    files = [f"--{what}={folder}/munge.{what.partition('-')[0]}" for what in ("socket", "key-file", "pid-file")]
    files += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    os.environ["SLURM_CONF"] = str(configuration)
    running = []
    try:
        for words in (
            ["munged", "--foreground", "--force", *files],
            ["slurmctld", "-D"],
            *(["slurmd", "-D", "-N", node] for node in NODES),
        ):
            running.append(subprocess.Popen(words, env=_environment(), stderr=subprocess.DEVNULL))
            _wait_for(folder / "munge.socket")
        yield
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()
        del os.environ["SLURM_CONF"]


def submit(script: Path) -> str:
    """What a job said, once it has ended well."""
    out = script.with_suffix(".out")
    words = ["sbatch", "--wait", f"--output={out}", f"--chdir={script.parent}", str(script)]
    ended = subprocess.run(words, check=False, env=_environment(), capture_output=True, text=True, timeout=RUNS)
    said = out.read_text(encoding="utf-8") if out.exists() else ""
    assert ended.returncode == 0, ended.stderr + said
    return said


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}


def _ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_for(path: Path) -> None:
    until = time.monotonic() + STARTS
    while not path.exists():
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.1)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where daemons are
