"""Memory and energy of a process, as the system counts them; None where it does not say. Nothing is estimated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

Nvml = Any  # pynvml and what it answers: it says nothing of its types
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CLOCKS = (("current", "ClockInfo"), ("max", "MaxClockInfo"))  # and what NVML calls them
RESET_PEAK = "5"  # what clear_refs takes to mean: the peak starts anew at what is resident now


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds now, in bytes.

    Attributes:
        own: pages that hold data of its own, in memory or swapped out.
        mapped: resident pages of files and of memory shared with others.
    """

    own: int
    mapped: int

    @property
    def resident(self) -> int:
        """Both."""
        return self.own + self.mapped


def held_bytes() -> Held:
    """Of this process, now."""
    found = _status()
    if "RssAnon" in found:
        own = found["RssAnon"] + found.get("VmSwap", 0)
        return Held(own, found.get("RssFile", 0) + found.get("RssShmem", 0))
    # Elsewhere: what would be free if the process ended.
    memory = psutil.Process().memory_full_info()
    return Held(memory.uss, max(0, memory.rss - memory.uss))


def peak_bytes() -> int | None:
    """Most that was ever resident since the process began, or since `reset_peak` succeeded."""
    return _status().get("VmHWM")


def _status() -> Mapping[str, int]:
    """Bytes by the names of /proc/self/status; empty where there is none."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return {}
    return {line.partition(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}


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
        device: as torch names it.
        uuid: of the GPU, as NVML names it. Without it, without NVML's Python package, or where NVML refuses, an answer
            is None unless CUDA has one.
    """

    def __init__(self, device: torch.device, uuid: str | None) -> None:
        self._device = device
        self._nvml: Nvml = None
        self._handle: Nvml = None
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

    def _ask(self, what: str, *arguments: int) -> Nvml:
        """NVML's answer; None where there is none."""
        if self._nvml is None:
            return None
        with suppress(self._nvml.NVMLError):
            return getattr(self._nvml, f"nvmlDeviceGet{what}")(self._handle, *arguments)
        return None

    def own_bytes(self) -> int | None:
        """Of this process, contexts and every runtime's allocations included. None also where the driver does not tell
        processes apart: in containers it knows them by other numbers.
        """
        processes = self._ask("ComputeRunningProcesses") or ()
        return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)

    def used_bytes(self) -> int | None:
        """Of the whole GPU, by all processes; without NVML from CUDA."""
        if self._device.type != "cuda":
            return None
        if memory := self._ask("MemoryInfo"):
            return int(memory.used)
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def joules(self) -> float | None:
        """Since the driver was loaded (Volta and newer); differences over less than about a second mean little."""
        millijoules = self._ask("TotalEnergyConsumption")
        return None if millijoules is None else float(millijoules) / 1000

    def driver(self) -> str | None:
        """Its version."""
        if self._nvml is None:
            return None
        with suppress(self._nvml.NVMLError):
            version = self._nvml.nvmlSystemGetDriverVersion()
            return version.decode() if isinstance(version, bytes) else str(version)
        return None

    def clocks(self) -> dict[str, float]:
        """Current and highest of the multiprocessors and the memory, in MHz."""
        if self._nvml is None:
            return {}
        kinds = {"sm": self._nvml.NVML_CLOCK_SM, "memory": self._nvml.NVML_CLOCK_MEM}
        asked = {f"{name} {state}": self._ask(what, kind) for name, kind in kinds.items() for state, what in CLOCKS}
        return {name: float(megahertz) for name, megahertz in asked.items() if megahertz is not None}


def gpu_name(device: torch.device) -> str | None:
    """NVML's name of a CUDA device; None of any other."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None
