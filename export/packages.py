"""Which optional packages an export needs, and the sentence that names the one that is missing."""

from __future__ import annotations

import importlib.util

from slimvlm.compress.errors import MissingDependencyError
from slimvlm.export.options import ExportOptions

NEEDED = {"onnx": ("onnx", "onnx_ir", "onnxscript", "onnxruntime")}


def installed_formats() -> tuple[str, ...]:
    """What can be exported here without being asked for: ONNX where its packages are, and TorchScript."""
    return ("onnx", "torchscript") if not _missing("onnx") else ("torchscript",)


def require_packages(options: ExportOptions) -> None:
    """Raises MissingDependencyError, with the pip command, if a format needs a package that is not here."""
    for form in options.formats:
        if missing := _missing(form):
            raise MissingDependencyError(
                f"the format {form} needs {', '.join(missing)}: pip install 'slimvlm[onnx]' ('slimvlm[gpu]' for CUDA)"
            )


def _missing(form: str) -> list[str]:
    return [name for name in NEEDED.get(form, ()) if importlib.util.find_spec(name) is None]
