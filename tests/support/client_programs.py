"""Where `make clients` put the programs of others, and how tests reach them."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

CLIENTS = Path(os.environ.get("SLIMVLM_CLIENTS", ""))
PYTHON = CLIENTS / "venv" / "bin" / "python"  # without torch


def packages(venv: str) -> str:
    """The site-packages of one of the clients' environments: behind our own on sys.path, it adds what we lack."""
    return sysconfig.get_path("purelib", "venv", {"base": str(CLIENTS / venv)})
