"""What is said of the device was read or measured here, quickly, and leaves no trace in the process."""

import time

import pytest
import torch

from slimvlm.serve.measuring.device import available_cores, measure_device

CPU = torch.device("cpu")


def test_the_processor_is_described_and_measured_within_seconds() -> None:
    began = time.process_time()
    device = measure_device(CPU, 1, ("fp32", "bf16", "int8"))
    assert time.process_time() - began < 4
    assert (device.kind, device.threads, device.driver) == ("cpu", 1, None)
    assert device.name and device.isa
    assert device.memory_bytes > 2**28
    assert set(device.matmul_flops_per_second) == {"fp32", "bf16"}  # torch multiplies no int8 matrices on every CPU
    assert list(device.copy_bytes_per_second) == sorted(device.copy_bytes_per_second, key=int)
    assert all(1e7 < rate < 1e14 for rate in device.copy_bytes_per_second.values())
    assert all(1e7 < rate < 1e16 for rate in device.matmul_flops_per_second.values())
    assert 1e-8 < device.launch_seconds < 1e-2


def test_the_number_of_threads_is_the_callers_again() -> None:
    before = torch.get_num_threads()
    measure_device(CPU, before + 1, ())
    assert torch.get_num_threads() == before


def test_no_more_cores_are_counted_than_the_process_may_use() -> None:
    assert 1 <= available_cores() <= torch.multiprocessing.cpu_count()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_is_described_and_measured() -> None:
    device = measure_device(torch.device("cuda"), 1, ("fp32", "bf16"))
    assert device.kind == "cuda"
    assert device.name == torch.cuda.get_device_name()
    assert device.isa[0].startswith("sm_")
    assert device.matmul_flops_per_second["bf16"] > device.matmul_flops_per_second["fp32"] > 1e11
    assert max(device.copy_bytes_per_second.values()) > 1e10
    assert 1e-7 < device.launch_seconds < 1e-3
