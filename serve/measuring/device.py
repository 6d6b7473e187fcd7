"""The device at hand: what it is, and how fast it is found to copy and to multiply. A few seconds of measuring.

The figures of a data sheet are not used: what counts is what this machine gives to this number of threads today.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F

from slimvlm.serve.backends.backend import clock_of
from slimvlm.serve.measuring.memory import Gpu, gpu_name
from slimvlm.serve.profile import Device

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Described = dict[str, Any]  # fields of `profile.Device`, each of its own type
MIB = 2**20
COPIED = {"cpu": (MIB, 8 * MIB, 32 * MIB, 256 * MIB), "cuda": (8 * MIB, 64 * MIB, 1024 * MIB)}  # buffer and its copy
MATRICES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192)}
COPY_SECONDS, MATMUL_SECONDS, LAUNCH_SECONDS = 0.05, 0.3, 0.05  # of measuring, per figure
LAUNCHES = 100
NO_TF32 = "NVIDIA_TF32_OVERRIDE"
ISA = ("sse4_2", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx", "asimd", "sve")
CPU, CACHES = Path("/proc/cpuinfo"), Path("/sys/devices/system/cpu/cpu0/cache")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")


def measure_device(device: torch.device, threads: int, dtypes: Sequence[str] = ("fp32",)) -> Device:
    """Describes `device` and measures it with `threads` threads (the caller's number is restored).

    A rate is the best that was seen with `threads` threads or with one: on a machine that does other things as well,
    threads that wait for each other can be slower than one, and a ceiling is what could have been reached.

    Args:
        dtypes: of DTYPES; others (int8) have no matmul rate.
    """
    counts = sorted({1, threads}) if device.type == "cpu" else [threads]
    copies: dict[str, float] = {}
    rates: dict[str, float] = {}
    launches = []
    for count in counts:
        with _settled(device, count), torch.inference_mode():
            for size in COPIED[device.type]:
                copies[str(size)] = max(_copy_rate(device, size), copies.get(str(size), 0.0))
            for name in (name for name in dtypes if name in DTYPES):
                rates[name] = max(_matmul_rate(device, DTYPES[name]), rates.get(name, 0.0))
            launches.append(launch_seconds(device))
    return Device(
        kind=device.type,
        threads=threads,
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        copy_bytes_per_second=copies,
        matmul_flops_per_second=rates,
        launch_seconds=min(launches),
        **describe_device(device),
    )


def describe_device(device: torch.device) -> Described:
    """What it is, without measuring: the fields of `profile.Device` that are read, not found."""
    return _describe_cuda(device) if device.type == "cuda" else _describe_cpu()


def available_cores() -> int:
    """Physical cores this process may use: not more than its affinity allows."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


def claim(device: torch.device) -> None:
    """Make a GPU the current one of this process, which is to compute on no other, and let fp32 mean fp32 in every
    library on it: ONNX Runtime, TensorRT and cuDNN would round to TF32 where torch does not. Nothing for a CPU.
    """
    if device.type == "cuda":
        os.environ[NO_TF32] = "0"  # read by NVIDIA's libraries when they are first used
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        torch.cuda.set_device(device)


@contextmanager
def _settled(device: torch.device, threads: int) -> Iterator[None]:
    """With so many threads, fp32 as it is, and `device` the current one; afterwards all is as it was."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


# ------------------------------------------------------------------ what it is


def _describe_cpu() -> Described:
    facts = _cpu_facts()
    flags = facts.get("flags", facts.get("Features", "")).split()
    found = tuple(name for name in ISA if any(flag.startswith(name) for flag in flags))
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    clocks = {name: getattr(frequency, name, 0.0) for name in ("current", "min", "max")}
    return {
        "name": facts.get("model name") or platform.processor() or platform.machine(),
        "memory_bytes": _host_memory(),
        "clock_mhz": {name: float(value) for name, value in clocks.items() if value},
        "cache_bytes": _cpu_caches(),
        "isa": found or (torch.backends.cpu.get_cpu_capability().lower(),),
        "driver": None,
    }


def _cpu_facts() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = CPU.read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_caches() -> dict[str, int]:
    """Level (L1, L2, L3) -> bytes one core sees, of data caches."""
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("KM")) * (MIB if size.endswith("M") else 1024)
    return found


def _host_memory() -> int:
    """Bytes of memory, or what a container may use of them."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(MEMORY_LIMIT.read_text()))
    except (OSError, ValueError):  # no limit: no file, or `max`
        return total


def _describe_cuda(device: torch.device) -> Described:
    properties, gpu = torch.cuda.get_device_properties(device), Gpu(device, gpu_name(device))
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "clock_mhz": gpu.clocks(),
        "cache_bytes": {"L2": properties.L2_cache_size},
        "isa": (f"sm_{properties.major}{properties.minor}", f"cuda {torch.version.cuda}"),
        "driver": gpu.driver(),
    }


# ------------------------------------------------------------------ how fast it is


def _copy_rate(device: torch.device, touched: int) -> float:
    """Bytes read and written per second when half of `touched` bytes are copied to the other half."""
    source = torch.ones(touched // 8, device=device)
    target = torch.zeros_like(source)
    return touched / _least_seconds(lambda: target.copy_(source), device, COPY_SECONDS)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of the best of a few square products; larger ones only while time lasts."""
    best, left = 0.0, MATMUL_SECONDS
    for size in MATRICES[device.type]:
        inputs, weights = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        began = time.perf_counter()
        seconds = _least_seconds(lambda a=inputs, b=weights: F.linear(a, b), device, left / 4)  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        left -= time.perf_counter() - began
        if left < 8 * 2 * seconds:  # the next size is eight times the work, and is run twice
            break
    return best


def launch_seconds(device: torch.device) -> float:
    """Of one matrix product with nothing to do, as part of many: what any operation costs at least."""
    inputs, weights = torch.ones(1, 8, device=device), torch.ones(8, 8, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            F.linear(inputs, weights)

    return _least_seconds(launch, device, LAUNCH_SECONDS) / LAUNCHES


def _least_seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """Least time of `run` over repetitions that take about `budget` seconds, after one to warm up; at least one."""
    clock = clock_of(device)

    def once() -> float:
        began = clock.mark()
        run()
        return clock.seconds([began, clock.mark()])[1]

    once()
    least, end = math.inf, time.perf_counter() + budget
    while True:
        least = min(least, once())
        if time.perf_counter() >= end:
            return least
