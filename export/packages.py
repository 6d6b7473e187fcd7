"""Which optional packages an export needs, and the sentence that names the one that is missing."""

from __future__ import annotations

import importlib.util

from slimvlm.compress.errors import MissingDependencyError
from slimvlm.export.options import ExportOptions

NEEDED = {"onnx": ("onnx", "onnx_ir", "onnxscript", "onnxruntime")}


def require_packages(options: ExportOptions) -> None:
    """Raises MissingDependencyError, with the pip command, if a format needs a package that is not here."""
    for form in options.formats:
        missing = [name for name in NEEDED.get(form, ()) if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(
                f"--format {form} needs {', '.join(missing)}: pip install 'slimvlm[onnx]' ('slimvlm[gpu]' for CUDA)"
            )
