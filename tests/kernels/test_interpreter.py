"""The Triton kernels against their references without a GPU: Triton's interpreter, in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
OPERATIONS = sorted(path.parent.name for path in (FOLDER.parents[1] / "kernels").glob("*/gpu.py"))


def run(code: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(
        [sys.executable, "-P", *code],
        cwd=FOLDER.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_interpreted_kernels_pass_every_comparison(operation):
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = run(["-m", "pytest", *options, str(FOLDER / f"test_{operation}.py")])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 5 and "skipped" not in result.stdout, result.stdout[-500:]
