"""Every comparison with a reference runs on each path: blocked torch on the CPU, Triton on a GPU or interpreted.

`TRITON_INTERPRET=1 pytest -m gpu tests/kernels` runs the Triton kernels as Python on the CPU; test_interpreter.py does
so in a process of its own, because triton reads that variable once, when it is imported.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Path:
    """One implementation of all operations, and the device it runs on."""

    name: str
    device: torch.device

    def module(self, operation: str) -> ModuleType:
        return importlib.import_module(f"slimvlm.kernels.{operation}.{self.name}")

    def put(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """On the device, with the strides it had."""
        if tensor is None or tensor.device == self.device:
            return tensor
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        return moved.copy_(tensor)


@pytest.fixture(params=["blocked", pytest.param("gpu", marks=pytest.mark.gpu)])
def path(request: pytest.FixtureRequest) -> Path:
    if request.param == "blocked":
        return Path("blocked", torch.device("cpu"))
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available() and not INTERPRETED:
        return Path("gpu", torch.device("cuda"))
    if not INTERPRETED:
        pytest.skip("needs a CUDA device (interpreted in test_interpreter.py)")
    return Path("gpu", torch.device("cpu"))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (or a large number): a kernel that leaves one element unwritten is seen."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor if tensor.dtype == torch.bool or tensor.is_complex() else tensor.fill_(101)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
