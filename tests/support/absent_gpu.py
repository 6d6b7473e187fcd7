"""A GPU that is not here: Triton binds, specialises and compiles for it as for a real one; launches are recorded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

NUMBERS = itertools.count()  # Triton keeps what it compiled per device


@dataclass(frozen=True)
class Launch:
    """What arrived at the driver."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


@dataclass
class AbsentGpu:
    """The driver of a GPU of compute capability 9.0. Everything above the driver is Triton's own.

    Attributes:
        launches: in their order.
        programs: the distinct ones that Triton compiled, or would have.
        tuned: how often configurations of a kernel were measured against each other.
    """

    launches: list[Launch] = field(default_factory=list)
    programs: set[str] = field(default_factory=set)
    tuned: int = 0
    number: int = field(default_factory=lambda: next(NUMBERS))

    @property
    def utils(self) -> AbsentGpu:
        return self

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def run_once(launch: Callable[[], None], quantiles: Any) -> list[float]:
            launch()
            self.tuned += 1
            return [1.0] * len(quantiles)

        return run_once

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert kernel.startswith(b"\x7fELF")
        return name, name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            x, y, z, _stream, name, *_rest = arguments
            self.launches.append(Launch(name, (x, y, z), arguments[9:]))

        return launch


@contextmanager
def absent_gpu(*, compiles: bool = True) -> Iterator[AbsentGpu]:
    """Within it, kernels launched on CPU tensors go to the absent GPU.

    Args:
        compiles: False only counts `programs`: nothing is compiled, so nothing is launched.
    """
    gpu, before = AbsentGpu(), (driver._active, knobs.runtime.jit_cache_hook)

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        gpu.programs.add(f"{fn.name} {key}")
        return not compiles

    driver.set_active(gpu)
    knobs.runtime.jit_cache_hook = note
    try:
        yield gpu
    finally:
        driver._active, knobs.runtime.jit_cache_hook = before
