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
    """What the driver says of one CUDA device, through NVML.

    Without its Python package, or where it refuses, every answer is None.

    Args:
        device: a CUDA device; anything else: every answer is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._nvml: Any = None
        if device.type == "cuda":
            with suppress(ImportError):
                import pynvml

                self._nvml = pynvml

    def used_bytes(self) -> int | None:
        """Of the whole device, by all processes. Can be asked before this process uses the device itself."""
        if self._nvml is None:
            return None
        with suppress(self._nvml.NVMLError, RuntimeError):
            return torch.cuda.device_memory_used(self.device)
        return None

    def joules(self) -> float | None:
        """Since the driver was loaded (Volta and newer); differences over less than about a second mean little."""
        if self._nvml is None:
            return None
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(self.device).uuid
            handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        return None
