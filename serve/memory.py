"""Memory and energy of a process, as the system counts them; None where it does not say. Nothing is estimated."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what clear_refs takes to mean: the peak starts anew at what is resident now


def resident_bytes() -> int:
    """Of this process, now."""
    return psutil.Process().memory_info().rss


def peak_bytes() -> int | None:
    """Most that was ever resident since the process began, or since `reset_peak` succeeded."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else 1024 * int(found.split()[1])


def reset_peak() -> bool:
    """Let the peak start at what is resident now; False where the system does not permit it."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


class Gpu:
    """What the driver says of one GPU, through NVML, which does not touch the GPU itself.

    Args:
        uuid: of the GPU, as NVML names it. Without it, without NVML's Python package, or where NVML refuses, every
            answer is None.
    """

    def __init__(self, uuid: str | None) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        if uuid is None:
            return
        try:
            import pynvml
        except ImportError:
            return
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            self._nvml = pynvml

    def used_bytes(self) -> int | None:
        """Of the whole GPU, by all processes."""
        if self._nvml is None:
            return None
        with suppress(self._nvml.NVMLError):
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        return None

    def joules(self) -> float | None:
        """Since the driver was loaded (Volta and newer); differences over less than about a second mean little."""
        if self._nvml is None:
            return None
        with suppress(self._nvml.NVMLError):
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        return None


def gpu_name(device: torch.device) -> str | None:
    """NVML's name of a CUDA device; None of any other."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None
