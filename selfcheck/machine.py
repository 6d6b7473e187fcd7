"""The machine and its software: versions, device, compiler, counters."""

from __future__ import annotations

import os
import platform
import shutil
import time

import psutil
import torch

from slimvlm.compress.files.writing import installed_versions
from slimvlm.export.running.runtimes import installed_runtimes, runtime_conflict
from slimvlm.selfcheck.ground import Ground
from slimvlm.selfcheck.outcome import SkippedError, WrongError
from slimvlm.serve.measuring.device import MIB, describe_device
from slimvlm.serve.measuring.memory import Gpu, gpu_name, held_bytes, peak_bytes

PACKAGES = (
    "slimvlm", "torch", "transformers", "triton", "peft", "accelerate", "safetensors", "numpy", "onnx", "onnxscript",
    "onnxruntime", "onnxruntime-gpu", "nvidia-ml-py",
)  # fmt: skip
LEAST_FREE = 2 << 30  # bytes: what the demo takes with the runtime's own
HELD, BUSY_SECONDS = 256 * MIB, 2.0  # allocated and computed for, to see the counters move


def check_versions(ground: Ground) -> str:
    """Which software is here; two ONNX Runtimes that overwrite each other are an error."""
    ground.facts["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    ground.facts |= installed_versions(PACKAGES) | {"torch": torch.__version__}
    if conflict := runtime_conflict(installed_runtimes()):
        raise WrongError(conflict)
    return ", ".join(f"{name} {version}" for name, version in ground.facts.items())


def check_device(ground: Ground) -> str:
    """What the device is, and whether the demo fits in what is free of it."""
    described = describe_device(ground.device)
    free = torch.cuda.mem_get_info(ground.device)[0] if ground.gpu else psutil.virtual_memory().available
    ground.facts["device"] = described["name"]
    if ground.gpu:
        ground.facts |= {"isa": " ".join(described["isa"]), "driver": described["driver"] or "unknown (no NVML)"}
    ground.facts["free"] = f"{free / 2**30:.1f} of {described['memory_bytes'] / 2**30:.1f} GiB"
    if free < LEAST_FREE:
        raise WrongError(f"{ground.facts['free']} are free, the demo takes up to {LEAST_FREE / 2**30:.0f} GiB")
    names = ("device", "isa", "driver")
    return ", ".join([*(ground.facts[name] for name in names if name in ground.facts), f"free {ground.facts['free']}"])


def check_compiler(ground: Ground) -> str:
    """The C compiler Triton builds its launchers with."""
    asked = os.environ.get("CC")
    found = shutil.which(asked) if asked else shutil.which("gcc") or shutil.which("clang")
    ground.facts["compiler"] = found or "none"
    if found:
        return f"{found}"
    if ground.gpu:
        wanted = f"CC={asked} is not there" if asked else "neither gcc nor clang is there"
        raise WrongError(f"{wanted}: Triton's kernels cannot be launched without one, plain torch takes their place")
    raise SkippedError("there is none, and only Triton's kernels on a GPU need one")


def check_memory(ground: Ground) -> str:
    """The counters of memory see what is allocated."""
    if not ground.gpu:
        before = held_bytes().own
        held = torch.ones(HELD // 4)
        grown, peak = held_bytes().own - before, peak_bytes()
        del held
        if grown < HELD // 2:
            raise WrongError(f"{HELD // MIB} MiB were allocated, the process grew by {grown / MIB:.0f} MiB")
        return f"the process grew by {grown / MIB:.0f} of {HELD // MIB} MiB, peak {(peak or 0) / MIB:.0f} MiB"
    counter = Gpu(ground.device, gpu_name(ground.device))
    torch.cuda.empty_cache()
    used = counter.used_bytes() or 0
    held = torch.ones(HELD // 4, device=ground.device)
    torch.cuda.synchronize(ground.device)
    grown = (counter.used_bytes() or 0) - used
    del held
    if not HELD // 2 <= grown <= 2 * HELD:
        raise WrongError(
            f"{HELD // MIB} MiB were allocated, the driver counts {grown / MIB:.0f} MiB more; another process may be "
            "using this GPU"
        )
    return f"the driver's count grew by {grown / MIB:.0f} of {HELD // MIB} MiB"


def check_energy(ground: Ground) -> str:
    """The counter of energy moves while the GPU computes."""
    ground.need_gpu("GPUs have a counter of energy that is read here")
    counter = Gpu(ground.device, gpu_name(ground.device))
    first = counter.joules()
    if first is None:
        raise SkippedError("NVML does not say (it does from Volta on, with nvidia-ml-py installed)")
    matrix = torch.ones(2048, 2048, device=ground.device)
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < BUSY_SECONDS:
        matrix @ matrix
        torch.cuda.synchronize(ground.device)
    joules = (counter.joules() or 0.0) - first
    if joules <= 0:
        raise WrongError(f"{joules:.1f} J were counted in {seconds:.1f} s of products")
    return f"{joules:.0f} J in {seconds:.1f} s of products, {joules / seconds:.0f} W"
