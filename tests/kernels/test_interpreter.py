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


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_kernels_pass_every_comparison():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ["-m", "gpu", "-v", "-p", "no:cacheprovider", "-p", "no:xdist"]
    files = [FOLDER / f"test_{operation}.py" for operation in OPERATIONS]
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *options, *files],
        cwd=FOLDER.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "SKIPPED" not in result.stdout
    for file in files:
        assert len(re.findall(rf"{file.name}::.* PASSED", result.stdout)) >= 5, file.name
