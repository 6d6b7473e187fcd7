"""Which GPU is waited for, timed, claimed and asked for its memory: the profiled one, whatever torch's current one is.

torch's and NVML's calls are recorded: there is no GPU here. Marked `gpu`: the same on a real one.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from profiling import save_pair

from slimvlm.serve.backends.backend import clock_of
from slimvlm.serve.measuring.bench import Bench, Source
from slimvlm.serve.measuring.device import NO_TF32, claim
from slimvlm.serve.measuring.memory import Gpu, gpu_name

SECOND = torch.device("cuda:1")
MIB = 2**20


@pytest.fixture
def recorded(monkeypatch):
    """(call, device) in their order."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            calls.append(("record", stream))

        def elapsed_time(self, other):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "set_device", "max_memory_allocated", "max_memory_reserved", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: calls.append((name, device)) or 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    return calls


def test_events_and_waits_are_those_of_the_profiled_gpu(recorded):
    clock = clock_of(SECOND)
    assert clock.seconds([clock.mark(), clock.mark()]) == [0.003, 0.003]
    assert recorded == [("record", SECOND), ("record", SECOND), ("synchronize", SECOND)]


def test_a_worker_computes_on_no_other_gpu_and_fp32_is_not_tf32(recorded, monkeypatch):
    monkeypatch.setenv(NO_TF32, "1")  # so that it is put back
    monkeypatch.delenv(NO_TF32)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    claim(torch.device("cpu"))
    assert (recorded, NO_TF32 in os.environ, torch.backends.cudnn.allow_tf32) == ([], False, True)
    claim(SECOND)
    assert recorded == [("set_device", SECOND)]
    assert (os.environ[NO_TF32], torch.backends.cudnn.allow_tf32) == ("0", False)


class Nvml(ModuleType):
    """NVML of a machine on which `processes` hold memory."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, processes, used=None):
        super().__init__("pynvml")
        self.processes, self.used, self.asked = processes, iter(used or ()), []

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.processes.items()]

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=next(self.used))


def with_nvml(monkeypatch, *arguments):
    nvml = Nvml(*arguments)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_the_driver_tells_what_this_process_holds(monkeypatch):
    nvml = with_nvml(monkeypatch, {1: 7 * MIB, os.getpid(): 300 * MIB})
    assert Gpu(SECOND, "GPU-b").own_bytes() == 300 * MIB
    assert nvml.asked == [b"GPU-b"]


@pytest.mark.parametrize("processes", ({1: 7 * MIB}, {os.getpid(): None}))
def test_a_driver_that_does_not_tell_processes_apart_leaves_the_figure_open(monkeypatch, processes):
    with_nvml(monkeypatch, processes)
    assert Gpu(SECOND, "GPU-b").own_bytes() is None


def test_without_nvml_cuda_says_what_is_used_and_a_cpu_has_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * MIB, 16 * MIB) if device == SECOND else None)
    gpu = Gpu(SECOND, "GPU-b")
    assert (gpu.own_bytes(), gpu.used_bytes(), gpu.joules()) == (None, 6 * MIB, None)
    cpu = Gpu(torch.device("cpu"), None)
    assert (cpu.own_bytes(), cpu.used_bytes()) == (None, None)


def bench_on_gpu(monkeypatch, backend, *nvml):
    """A bench that was told to be on a GPU, and whose turns grow what is held there."""
    with_nvml(monkeypatch, *nvml)
    bench = Bench(Source("", backend, "cuda:1", "cuda:1", 1, "auto", gpu="GPU-b"))
    monkeypatch.setattr(bench, "_run", lambda clock, new_tokens: {"tpot": 1.0})
    bench.turn(1, 1)
    return bench.memory()


def test_memory_of_onnx_on_a_gpu_is_the_drivers_and_not_that_of_torchs_allocator(recorded, monkeypatch):
    memory = bench_on_gpu(monkeypatch, "onnx", {os.getpid(): 300 * MIB}, [100 * MIB, 350 * MIB])
    assert (memory.device_driver_bytes, memory.device_peak_bytes, memory.device_reserved_bytes) == (
        *(300 * MIB, None),
        None,
    )
    in_container = bench_on_gpu(monkeypatch, "onnx", {}, [100 * MIB, 350 * MIB])
    assert in_container.device_driver_bytes == 250 * MIB
    assert not recorded
    assert bench_on_gpu(monkeypatch, "torch", {}, [100 * MIB, 350 * MIB]).device_reserved_bytes == 0
    assert recorded == [("max_memory_allocated", SECOND), ("max_memory_reserved", SECOND)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_is_timed_and_its_memory_read(tmp_path):
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    folder = save_pair(tmp_path)[0]
    bench = Bench(Source(folder, "torch", str(device), str(device), 1, "auto", gpu=gpu_name(device)))
    bench.load()
    ids = np.full((1, 8), 5)
    bench.place({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    [run] = bench.turn(4, 1)
    assert 0 < run["tpot"] < run["end_to_end"] < 60
    memory = bench.memory()
    assert memory.device_driver_bytes >= memory.device_reserved_bytes >= memory.device_peak_bytes > 0
    assert torch.cuda.current_device() == device.index
