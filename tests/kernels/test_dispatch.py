"""The path follows the device; a GPU without Triton is served by torch, with one warning."""

import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch

from slimvlm.kernels import dispatch
from slimvlm.kernels.taylor import DTYPES


@dataclass
class OnGpu:
    """What the choice looks at, of a tensor on a GPU."""

    dtype: torch.dtype = torch.float32
    is_cuda: bool = True


@pytest.fixture(autouse=True)
def fresh_answer():
    dispatch._has_triton.cache_clear()
    yield
    dispatch._has_triton.cache_clear()


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


def test_a_gpu_runs_triton_where_it_is_installed():
    pytest.importorskip("triton", reason="triton is not installed")
    assert dispatch.choose("taylor", None, OnGpu(), dtypes=DTYPES).__name__.endswith("taylor.gpu")


def test_a_dtype_triton_does_not_take_runs_torch():
    assert dispatch.choose("taylor", OnGpu(), OnGpu(torch.float64), dtypes=DTYPES).__name__.endswith("taylor.blocked")


def test_a_gpu_without_triton_runs_torch_and_says_once_how_to_install_it(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match=r"pip install 'slimvlm\[triton\]'"):
        assert dispatch.choose("gather", OnGpu()).__name__.endswith("gather.blocked")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("histogram", OnGpu()).__name__.endswith("histogram.blocked")
