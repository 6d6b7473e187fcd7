"""The machine at hand as a `Machine`: a matrix product, a copy, a digest, a read of the disk; a few seconds in all."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path

import torch

from slimvlm.serve.costing.machines import Machine
from slimvlm.serve.measuring.device import available_cores, measure_device

PROBED = 256 * 2**20  # bytes of the file that is written and read
DIGESTED = 64 * 2**20
PIECE = 8 * 2**20


def measure_machine(dtype: str, folder: Path | None = None, threads: int | None = None) -> Machine:
    """The processor at hand with `threads` threads (the cores), and the disk of `folder` (the temporary one).

    Args:
        dtype: in which most is computed, `fp32`, `bf16` or `fp16`.
    """
    threads = threads or available_cores()
    device = measure_device(torch.device("cpu"), threads, sorted({"fp32", dtype}))
    copies = {int(size): rate for size, rate in device.copy_bytes_per_second.items()}
    read, written = _disk_rates(folder)
    return Machine(
        says=f"{device.name}, {threads} threads",
        devices=1,
        flops_per_second=dict(device.matmul_flops_per_second),
        bytes_per_second=copies[max(copies)],
        launch_seconds=device.launch_seconds,
        read_bytes_per_second=read,
        write_bytes_per_second=written,
        digest_bytes_per_second=_digest_rate(),
        memory_bytes=device.memory_bytes,
        host_bytes=device.memory_bytes,
        measured=True,
    )


def _digest_rate() -> float:
    data = bytes(DIGESTED)
    began = time.perf_counter()
    hashlib.sha256(data)
    return DIGESTED / (time.perf_counter() - began)


def _disk_rates(folder: Path | None) -> tuple[float, float]:
    """Bytes read and written per second: of a file that is written through to the disk and read from there, where the
    system can be told to forget it.
    """
    piece = os.urandom(PIECE)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(PROBED // PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        written = PROBED / (time.perf_counter() - began)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(PIECE):
            pass
        return PROBED / (time.perf_counter() - began), written
