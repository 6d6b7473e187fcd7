"""More than one: the other GPU, and two processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from slimvlm.demo import MODEL, SAMPLES
from slimvlm.selfcheck.ground import Ground
from slimvlm.selfcheck.job import Job
from slimvlm.selfcheck.outcome import SkippedError, WrongError

SECONDS = 180  # after which two processes that wait for each other have failed
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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise WrongError(f"two processes did not end within {SECONDS} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error" in line] or [f"exit code {done.returncode}"]
        raise WrongError(f"two processes failed: {said[0].strip()}")
    return f"two processes planned and trained 2 steps together ({'nccl' if ground.gpu else 'gloo'})"
