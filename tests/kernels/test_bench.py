"""`slimvlm kernels`: correctness first, then counted bytes and times, never a CPU's figure for a GPU's."""

import json
from dataclasses import replace

import pytest
import torch

from slimvlm.kernels import FOLDERS, bench
from slimvlm.kernels.bench import BenchOptions, describe, run
from slimvlm.kernels.workloads import SHAPES, Shape, make_workloads

TINY = Shape("tiny", "gate", 48, 32)
WORKLOADS = make_workloads(TINY, torch.float32, torch.device("cpu"))
KERNELS = {workload.kernel for workload in WORKLOADS}


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    monkeypatch.setattr(bench, "CACHE_BYTES", {"cpu": 1024, "cuda": 1024})
    monkeypatch.setattr(bench, "COPY_BYTES", 4096)


def test_every_operation_has_a_workload():
    assert {workload.operation for workload in WORKLOADS} == set(FOLDERS.values())


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_every_kernel_is_checked_and_then_timed(device):
    report = run(BenchOptions(device=device, shapes=[TINY], repeats=2, compiled=False))
    assert {check.kernel for check in report.checks} == KERNELS == {timing.kernel for timing in report.timings}
    assert not report.failures
    for timing in report.timings:
        assert timing.path == ("triton" if device == "cuda" else "blocked torch")
        assert timing.median_ms > 0 and timing.eager_ms > 0 and timing.compiled_ms is None
        assert timing.gb_per_s == pytest.approx(timing.bytes_moved / timing.median_ms / 1e6)
        assert timing.copy_share == pytest.approx(timing.gb_per_s / report.copy_gb_per_s)


def test_a_cpu_report_says_that_it_is_no_gpu_report():
    report = run(BenchOptions(shapes=[TINY], repeats=1))
    document = json.loads(json.dumps(report.to_dict()))
    assert (
        document["device"] == "cpu" and document["passed"] and "the Triton kernels were not run" in document["notes"][0]
    )
    assert "the Triton kernels were not run" in describe(
        report
    ) and f"{len(WORKLOADS)} of {len(WORKLOADS)} checks" in describe(report)


def test_nothing_is_timed_once_a_kernel_is_wrong(monkeypatch):
    def one_wrong(*arguments):
        first, *rest = make_workloads(*arguments)
        return [replace(first, ours=lambda *operands: first.ours(*operands) * 1.001), *rest]

    monkeypatch.setattr(bench, "make_workloads", one_wrong)
    report = run(BenchOptions(shapes=[TINY], repeats=1))
    assert [check.kernel for check in report.failures] == ["taylor_sums rows"] and report.timings == []
    assert "WRONG: taylor_sums rows on tiny gate in float32" in describe(report)
    assert not report.to_dict()["passed"]


def test_bytes_are_counted_once_each():
    moved = {work.kernel: work.moved for work in make_workloads(TINY, torch.bfloat16, torch.device("cpu"), tokens=8)}
    assert moved["taylor_sums rows"] == 48 * 32 * (2 + 4) + 4 * 48
    assert moved["taylor_sums columns"] == 48 * 32 * (2 + 4) + 4 * 32
    assert moved["row_norms"] == 8 * 32 * 2 + 8 * 4
    assert moved["angle_histogram"] == 8 * 48 * 2 + 8 * 4 + 48 * 4 + 2 * 48 * 100 * 8
    assert moved["gather_2d half of both"] == 2 * 24 * 16 * 2 + (24 + 16) * 8
    assert moved["gather_blocks"] == 2 * 48 * 32 * 2 + (24 + 16) * 8


def test_shapes_are_those_of_four_models():
    assert {shape.model for shape in SHAPES} == {"BLIP-2 Flan-T5-XL", "LLaVA-1.5-7B", "Qwen2.5-VL-3B", "SmolVLM-256M"}
