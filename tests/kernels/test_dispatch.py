"""The path follows the device; a GPU without Triton is served by torch, with one warning."""

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch

from slimvlm.kernels import dispatch
from slimvlm.kernels.taylor import DTYPES

HOST = torch.device("cpu")


@dataclass
class OnGpu:
    """What the choice looks at, of a tensor on a GPU."""

    dtype: torch.dtype = torch.float32
    is_cuda: bool = True
    device: torch.device = HOST  # where the trial launch really takes place


@pytest.fixture(autouse=True)
def fresh_answer():
    dispatch.why_not_triton.cache_clear()
    yield
    dispatch.why_not_triton.cache_clear()


CHOICE = """
import warnings, torch
from slimvlm.kernels import dispatch
class OnGpu:
    dtype, is_cuda, device = torch.float32, True, torch.device("cpu")
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for operation in ("taylor", "gather"):
        print(dispatch.choose(operation, OnGpu()).__name__.removeprefix("slimvlm.kernels."))
for warning in seen:
    print(warning.message)
"""


def choose_in_a_process(code: str = CHOICE, **environment: str) -> list[str]:
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, **environment}
    environment.pop("CC", None)
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return result.stdout.splitlines()


def test_a_cpu_runs_blocked_torch_and_does_not_import_triton():
    code = (
        "import sys, torch; from slimvlm import kernels\n"
        "weight = torch.ones(4, 4); kernels.taylor_sums(weight, weight, 0); kernels.row_norms(weight)\n"
        "kernels.gather_2d(weight, None, None); kernels.gather_blocks(weight, None, None)\n"
        "counts = torch.zeros(4, 100, dtype=torch.int64)\n"
        "kernels.angle_histogram(weight, torch.ones(4), torch.ones(4), None, counts)\n"
        "print('triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_a_gpu_runs_triton_where_its_trial_launch_works():
    pytest.importorskip("triton", reason="triton is not installed")
    assert choose_in_a_process(TRITON_INTERPRET="1") == ["taylor.gpu", "gather.gpu"]


def test_a_gpu_without_a_c_compiler_runs_torch_and_says_once_why(tmp_path):
    """Triton's CUDA driver starts as on a machine with a GPU, and finds no compiler to build its launcher with."""
    pytest.importorskip("triton", reason="triton is not installed")
    code = "import torch\ntorch.cuda.is_available = lambda: True" + CHOICE
    environment = {"TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path), "PATH": str(tmp_path)}
    first, second, *warnings_seen = choose_in_a_process(code, **environment)
    assert (first, second) == ("taylor.blocked", "gather.blocked")
    assert len(warnings_seen) == 1 and "(Failed to find C compiler" in warnings_seen[0]
    assert "run on plain torch on this GPU" in warnings_seen[0] and "needs a C compiler" in warnings_seen[0]


def test_a_launch_that_gives_a_wrong_result_is_not_used():
    pytest.importorskip("triton", reason="triton is not installed")
    from absent_gpu import absent_gpu

    with absent_gpu(), pytest.warns(RuntimeWarning, match="triton's first launch gave a wrong result: scoring"):
        assert dispatch.choose("taylor", OnGpu()).__name__.endswith("taylor.blocked")


def test_a_dtype_triton_does_not_take_runs_torch():
    assert dispatch.choose("taylor", OnGpu(), OnGpu(torch.float64), dtypes=DTYPES).__name__.endswith("taylor.blocked")


def test_a_gpu_without_triton_runs_torch_and_says_once_how_to_install_it(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match=r"pip install 'slimvlm\[triton\]'"):
        assert dispatch.choose("gather", OnGpu()).__name__.endswith("gather.blocked")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("histogram", OnGpu()).__name__.endswith("histogram.blocked")
