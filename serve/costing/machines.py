"""What a compression may run on: rows of known machines, by the figures of their data sheets. No torch.

A data sheet says what nobody reaches: its rates count by `efficiency`, and what is told of such a row is an estimate.
The machine at hand is measured (`probe.py`) and has an efficiency of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any  # fields of a row, each of its own type

from slimvlm.compress.errors import UnsuitableOptionError

GIB = 2**30
HERE = ("auto", "cpu")  # the machine at hand, measured


@dataclass(frozen=True, slots=True)
class Machine:
    """What a compression runs on.

    Attributes:
        says: what it is, in words.
        devices: that divide the samples among them.
        flops_per_second: of matrix products on one device, by dtype (`fp32`, `bf16`, `fp16`).
        bytes_per_second: read and written in the memory of one device.
        launch_seconds: of an operation with nothing to do.
        read_bytes_per_second, write_bytes_per_second: of the disk, which all devices share.
        digest_bytes_per_second: of sha256, by which weight files are checked.
        memory_bytes: of one device; `host_bytes`: of the machine.
        efficiency: share of the first two rates that is reached; 1 where they were measured.
        measured: here and now; else the figures are a data sheet's.
        batch_size: samples that are calibrated on at once.
    """

    says: str
    devices: int
    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    launch_seconds: float
    read_bytes_per_second: float
    write_bytes_per_second: float
    digest_bytes_per_second: float
    memory_bytes: int
    host_bytes: int
    efficiency: float = 1.0
    measured: bool = False
    batch_size: int = 1


# A common NVMe disk, and sha256 with instructions for it.
DISK: dict[str, Any] = {"read_bytes_per_second": 2e9, "write_bytes_per_second": 1e9, "digest_bytes_per_second": 1.5e9}
GPU: dict[str, Any] = {"launch_seconds": 5e-6, "efficiency": 0.4, "batch_size": 16, **DISK}

MACHINES: Mapping[str, Machine] = {
    "cpu:2-cores": Machine(
        says="2 cores of a server with bf16 in AVX-512",
        devices=1,
        flops_per_second={"fp32": 2.5e11, "bf16": 5e11, "fp16": 2.5e11},
        bytes_per_second=2e10,
        launch_seconds=3e-6,
        memory_bytes=24 * GIB,
        host_bytes=24 * GIB,
        efficiency=0.7,
        **DISK,
    ),
    "cuda:rtx-4090": Machine(  # Ada whitepaper: dense, fp32 accumulation
        says="one RTX 4090, 24 GB",
        devices=1,
        flops_per_second={"fp32": 8.26e13, "bf16": 1.652e14, "fp16": 1.652e14},
        bytes_per_second=1.008e12,
        memory_bytes=24 * GIB,
        host_bytes=64 * GIB,
        **GPU,
    ),
    "cuda:8xh100": Machine(  # H100 SXM: dense
        says="eight H100 SXM, 80 GB each",
        devices=8,
        flops_per_second={"fp32": 6.7e13, "bf16": 9.89e14, "fp16": 9.89e14},
        bytes_per_second=3.35e12,
        memory_bytes=80 * GIB,
        host_bytes=1024 * GIB,
        **GPU,
    ),
}


def machine_named(name: str) -> Machine:
    """The row `name`.

    Raises:
        UnsuitableOptionError: there is none.
    """
    if name not in MACHINES:
        known = ", ".join((*HERE, *MACHINES))
        raise UnsuitableOptionError(f"the machine {name!r} is unknown; choose one of {known}")
    return MACHINES[name]
