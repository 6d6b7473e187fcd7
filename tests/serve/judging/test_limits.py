"""A limit is held against the worst cell of the slim model, on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
from profiles import example_profile

from slimvlm.serve.judging.limits import check_limits, limit_words
from slimvlm.serve.options import ProfileOptions
from slimvlm.serve.profile import MEASURED, OUT_OF_MEMORY, Cell, Memory, Run


def cell(backend, slim_ms, memory, status=MEASURED):
    runs = {
        name: Run({}, (), memory, medians={"ttft": milliseconds / 1000})
        for name, milliseconds in (("dense", 900.0), ("slim", slim_ms))
    }
    return Cell(backend, "fp32", 1, None, 8, 4, status, runs=runs)


CELLS = (cell("torch", 20.0, Memory(1, 0, 100, 40, 60, 90)), cell("onnx", 30.0, Memory(1, 0, 500, None, None, 70)))


def limits(cells=CELLS, kind="cpu", **asked):
    profile = example_profile()
    profile = replace(profile, cells=cells, device=replace(profile.device, kind=kind))
    return check_limits(ProfileOptions(slim="", **asked), profile)


def test_the_worst_cell_counts_and_the_dense_model_does_not():
    [limit] = limits(max_ttft_ms=25.0)
    assert (limit.worst, limit.crossed, limit.cell) == (30.0, True, "onnx, batch 1, prompt 8, new 4")
    assert limit_words(limit).startswith("--max-ttft-ms 25: the slim model takes 30 ms (onnx, batch 1")
    assert not limits(max_ttft_ms=30.0)[0].crossed
    assert limits() == ()


def test_memory_is_what_the_gpus_driver_shows_whatever_allocator_took_it_and_the_hosts_on_a_cpu():
    assert limits(max_memory=99)[0].worst == 500
    assert limits(kind="cuda", max_memory=99)[0].worst == 90
    assert limits(CELLS[1:], kind="cuda", max_memory=99)[0].worst == 70


def test_device_memory_that_cannot_be_read_is_not_taken_from_the_host():
    unread = cell("onnx", 30.0, Memory(1, 0, 500))
    assert limits((unread,), kind="cuda", max_memory=99)[0].worst is None


def test_a_slim_model_that_was_measured_alone_counts():
    assert limits((cell("torch", 70.0, Memory(1, 0, 2), OUT_OF_MEMORY),), max_ttft_ms=60.0)[0].crossed


@pytest.mark.parametrize("name", ("max_tpot_ms", "max_ttft_ms"))
def test_a_limit_that_nothing_was_measured_for_is_crossed(name):
    [limit] = limits((Cell("torch", "fp32", 1, None, 8, 4, OUT_OF_MEMORY),), **{name: 5.0})
    assert (limit.worst, limit.crossed) == (None, True)
    assert "no cell was measured" in limit_words(limit)
