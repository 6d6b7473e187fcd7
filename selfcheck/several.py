"""More than one: the other GPU, and two processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import psutil
import torch

from slimvlm.demo import MODEL, SAMPLES
from slimvlm.selfcheck.ground import Ground
from slimvlm.selfcheck.job import Job
from slimvlm.selfcheck.outcome import SkippedError, WrongError

SECONDS = 240  # after which two processes that wait for each other have failed
SHARED = "run of two"
STRAY = 64 << 20  # bytes a process may come to hold on a GPU it was not told to use


def check_other_gpu(ground: Ground) -> str:
    """The same job on another GPU than the one asked for: nothing of it may land elsewhere."""
    ground.need_gpu("another GPU than the first can be tried on a machine with two")
    if torch.cuda.device_count() < 2:
        raise SkippedError("this machine has one GPU")
    other = torch.device("cuda", 1 if ground.device.index == 0 else 0)
    before = torch.cuda.memory_reserved(ground.device)
    torch.cuda.reset_peak_memory_stats(ground.device)
    job = Job(Ground(other, ground.folder), f"run on {other.index}")
    job.cut()
    job.recover()
    stray = torch.cuda.max_memory_reserved(ground.device) - before
    if stray > STRAY:
        raise WrongError(f"the job on {other} took {stray / 2**20:.0f} MiB of {ground.device}")
    return f"plan, cut, refit and recovery on {other}, nothing of it on {ground.device}"


def check_two_processes(ground: Ground) -> str:
    """Two processes plan and train one model, each on its own GPU, or both on the CPU."""
    if ground.gpu and torch.cuda.device_count() < 2:
        raise SkippedError("this machine has one GPU, and two processes need one each")
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = {
        "--data": SAMPLES / "val.jsonl", "--ratio": 0.3, "--rounds": 1, "--samples": 16, "--batch-size": 4,
        "--eval-samples": 8, "--steps": 2, "--train-batch-size": 8, "--validation-samples": 8, "--export": "none",
        "--device": "cuda" if ground.gpu else "cpu",
    }  # fmt: skip
    out = ground.folder / SHARED
    given = [str(part) for pair in options.items() for part in pair]
    command = [*launcher, "-m", "slimvlm.cli", "compress", str(MODEL), str(out), *given, "--no-profile", "--quiet"]
    code, said = run_or_end(command, SECONDS)
    if code:
        lines = [line for line in said.splitlines() if "Error" in line] or [f"exit code {code}"]
        raise WrongError(f"two processes failed: {lines[0].strip()}")
    return f"two processes planned and trained 2 steps together ({'nccl' if ground.gpu else 'gloo'})"


def run_or_end(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """Exit code and stderr of a launcher.

    Raises:
        WrongError: it did not end within so many seconds; then it and the processes it started are ended.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            _, said = process.communicate(timeout=seconds)
        except BaseException as error:
            # By their descent: the launcher gives each a session of its own.
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise WrongError(f"two processes did not end within {seconds:g} s") from None
            raise
    return process.returncode, said
