"""The command prints what the measurement says: how often processes were started, and every ratio with its interval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from profiles import example_profile

from slimvlm.console.show_profile import show_profile


def test_starts_and_intervals_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show_profile(example_profile(), Path("profile.json"), as_json=False)
    printed = capsys.readouterr().out
    assert "torch fp32, batch 1, image 32 x 32, prompt 16, new 16, 3 starts" in printed
    assert "2.00 (1.90 to 2.10)" in printed
    assert "128.0 MiB" in printed  # of the host, on a CPU


def test_peak_memory_on_a_gpu_is_the_drivers(capsys: pytest.CaptureFixture[str]) -> None:
    profile = example_profile()
    cell = profile.cells[0]
    runs = {
        name: replace(run, memory=replace(run.memory, device_driver_bytes=2**28)) for name, run in cell.runs.items()
    }
    on_gpu = replace(profile, cells=(replace(cell, runs=runs),), device=replace(profile.device, kind="cuda"))
    show_profile(on_gpu, Path("profile.json"), as_json=False)
    assert "256.0 MiB" in capsys.readouterr().out
