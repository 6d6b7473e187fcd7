"""Check the kernels on this device against plain torch, and only then time them.

Every figure names the device it was measured on; what ran on a CPU is a figure of the CPU path and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from slimvlm.kernels.workloads import SHAPES, Shape, Workload, make_workloads

CACHE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # written between two runs, so that operands come from memory
REPEATS = {"cpu": 5, "cuda": 20}
COPY_BYTES = 256 << 20
BUSY = 1.0  # load average from which times on a CPU say little
SCHEMA = 1

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        device: `cpu`, `cuda` or `cuda:N`.
        shapes: matrices of the table of models.
        dtypes: of weights and activations; None: bfloat16 and float32 on a GPU, float32 on a CPU.
        repeats: timed runs of each, of which the median is reported; None: 20 on a GPU, 5 on a CPU.
        compiled: also time torch.compile of the plain torch (needs a C++ compiler on a CPU); None: on a GPU only.
    """

    device: str = "cpu"
    shapes: Sequence[Shape] = SHAPES
    dtypes: Sequence[torch.dtype] | None = None
    repeats: int | None = None
    compiled: bool | None = None


@dataclass(frozen=True)
class Check:
    """Whether a kernel gave what plain torch gives."""

    kernel: str
    model: str
    part: str
    dtype: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """The error is within its bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds; gigabytes are 10^9 bytes; `copy_share` is of the bandwidth a copy reaches here."""

    kernel: str
    path: str
    model: str
    part: str
    rows: int
    cols: int
    dtype: str
    median_ms: float
    bytes_moved: int
    gb_per_s: float
    copy_share: float
    eager_ms: float
    compiled_ms: float | None


@dataclass(frozen=True)
class Report:
    """What was found on one device. `timings` is empty if a check failed."""

    device: str
    device_name: str
    threads: int
    versions: dict[str, str]
    checks: list[Check]
    copy_gb_per_s: float | None = None
    timings: list[Timing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        """Kernels whose results are wrong here."""
        return [check for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema": SCHEMA, **asdict(self), "passed": not self.failures}


def run(options: BenchOptions, progress: Progress = lambda stage, done, total: None) -> Report:
    """Gate on correctness, then time every kernel on every shape.

    Args:
        progress: called with ("check" or "time", done, total).
    """
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    dtypes = options.dtypes or ((torch.bfloat16, torch.float32) if gpu else (torch.float32,))
    cases = [(shape, dtype) for shape in options.shapes for dtype in dtypes]
    checks = []
    for done, (shape, dtype) in enumerate(cases, start=1):
        checks += [check_workload(workload) for workload in make_workloads(shape, dtype, device)]
        progress("check", done, len(cases))
    report = Report(device.type, _name(device), torch.get_num_threads(), _versions(), checks, notes=_notes(device))
    if report.failures:
        return report
    clock = Clock(device, options.repeats or REPEATS[device.type])
    copy = _copy_bandwidth(clock)
    compiled = gpu if options.compiled is None else options.compiled
    timings = []
    for done, (shape, dtype) in enumerate(cases, start=1):
        for workload in make_workloads(shape, dtype, device):
            timings.append(_time(workload, clock, copy, compiled, report.notes))
        progress("time", done, len(cases))
    return replace(report, copy_gb_per_s=copy, timings=timings)


class Clock:
    """Median run time of a function on a device, with cold caches."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self.repeats = repeats
        self._cache = torch.empty(CACHE_BYTES[device.type], dtype=torch.int8, device=device)

    def median(self, function: Callable[[], object]) -> float:
        """Milliseconds; two runs first, for compilation and memory."""
        for _ in range(2):
            function()
        return statistics.median(self._once(function) for _ in range(self.repeats))

    def _once(self, function: Callable[[], object]) -> float:
        self._cache.zero_()
        if self.device.type != "cuda":
            started = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            start.record()
            function()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end))


def check_workload(workload: Workload) -> Check:
    """Run it and plain torch once, and compare."""
    results = []
    for function in (workload.ours, workload.eager):
        operands = [tensor.clone() if tensor.dtype == torch.int64 else tensor for tensor in workload.operands]
        results.append(function(*operands))  # counts are added to: each gets its own
    shape, judge = workload.shape, workload.judge
    return Check(workload.kernel, shape.model, shape.part, workload.dtype, judge.error(*results), judge.bound)


def _time(workload: Workload, clock: Clock, copy: float, compiled: bool, notes: list[str]) -> Timing:
    ours, eager = (clock.median(partial(one, *workload.operands)) for one in (workload.ours, workload.eager))
    speed, shape = workload.moved / ours / 1e6, workload.shape
    return Timing(
        kernel=workload.kernel,
        path=workload.path,
        model=shape.model,
        part=shape.part,
        rows=shape.rows,
        cols=shape.cols,
        dtype=workload.dtype,
        median_ms=ours,
        bytes_moved=workload.moved,
        gb_per_s=speed,
        copy_share=speed / copy,
        eager_ms=eager,
        compiled_ms=_time_compiled(workload, clock, notes) if compiled else None,
    )


def _time_compiled(workload: Workload, clock: Clock, notes: list[str]) -> float | None:
    """None, and a note, where torch.compile cannot serve this machine."""
    from torch._dynamo.exc import TorchDynamoException

    torch._dynamo.reset()  # its limit of recompilations counts all shapes together
    function = torch.compile(workload.eager, dynamic=False)
    try:
        return clock.median(lambda: function(*workload.operands))
    except (TorchDynamoException, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        notes.append(f"torch.compile of {workload.kernel} on {workload.shape.model} failed: {reason}")
        return None


def _copy_bandwidth(clock: Clock) -> float:
    """Bytes read and written by a copy of 256 MB, in gigabytes per second."""
    source, target = (torch.empty(COPY_BYTES // 4, device=clock.device) for _ in range(2))
    source.fill_(1)
    return 2 * COPY_BYTES / clock.median(lambda: target.copy_(source)) / 1e6


def _notes(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return []
    notes = ["measured on a CPU: these are figures of the blocked torch path; the Triton kernels were not run"]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > BUSY:
        notes.append(f"the machine was busy (load average {load:.1f} before the start): times and shares are noise")
    return notes


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("slimvlm", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe(report: Report) -> str:
    """The report as lines of text."""
    bandwidth = "" if report.copy_gb_per_s is None else f", a copy reaches {report.copy_gb_per_s:.0f} GB/s"
    lines = [f"{report.device_name} ({report.device}), torch {report.versions['torch']}{bandwidth}"]
    lines += report.notes
    lines.append(
        f"{len(report.checks) - len(report.failures)} of {len(report.checks)} checks against plain torch passed"
    )
    for check in report.failures:
        where = f"{check.kernel} on {check.model} {check.part} in {check.dtype}"
        lines.append(f"WRONG: {where}: error {check.error:.3g}, allowed {check.bound:.3g}")
    if report.timings:
        lines.append(
            f"{'kernel':33}{'model':19}{'matrix':28}{'dtype':10}{'ms':>9}{'GB/s':>8}{'of copy':>9}{'eager ms':>10}"
            f"{'compiled':>10}"
        )
    for one in report.timings:
        compiled = "-" if one.compiled_ms is None else f"{one.compiled_ms:.3f}"
        lines.append(
            f"{one.kernel:33}{one.model:19}{f'{one.part} {one.rows} x {one.cols}':28}{one.dtype:10}{one.median_ms:9.3f}"
            f"{one.gb_per_s:8.1f}{one.copy_share:9.0%}{one.eager_ms:10.3f}{compiled:>10}"
        )
    return "\n".join(lines)
