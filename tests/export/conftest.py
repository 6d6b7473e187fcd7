"""Every family is exported once per session; the tests look at the folder."""

from __future__ import annotations

import pytest
from exports import export_tiny


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A function: family name -> its export (ONNX, fp32, the fast exporter), made at first use."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = export_tiny(name, tmp_path_factory.mktemp(name) / "export")
        return done[name]

    return get
