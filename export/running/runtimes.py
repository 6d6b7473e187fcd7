"""Which ONNX Runtime builds are installed. Imports none of them."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, distribution

# Two distributions that install the same package `onnxruntime`, each overwriting the other's files.
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def installed_runtimes() -> tuple[str, ...]:
    """Names of the ONNX Runtime distributions present here."""
    return tuple(name for name in RUNTIMES if _is_installed(name))


def runtime_conflict(installed: Collection[str]) -> str | None:
    """The warning a user needs if both builds are `installed` (names as of `installed_runtimes`), else None."""
    if not set(RUNTIMES) <= set(installed):
        return None
    return (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files, so either may fail or "
        "run on the CPU. Keep one: pip uninstall onnxruntime onnxruntime-gpu, then pip install 'slimvlm[onnx]' (CPU) "
        "or 'slimvlm[gpu]'."
    )


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
