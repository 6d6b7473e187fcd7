"""The package imports nothing heavy until a kernel is asked for."""

import subprocess
import sys

import pytest

import slimvlm.kernels


def test_importing_kernels_imports_neither_torch_nor_triton():
    code = "import sys, slimvlm.kernels; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_resolves_and_others_do_not():
    for name in slimvlm.kernels.__all__:
        assert callable(getattr(slimvlm.kernels, name))
    with pytest.raises(AttributeError, match="has no attribute 'softmax'"):
        slimvlm.kernels.softmax  # noqa: B018
