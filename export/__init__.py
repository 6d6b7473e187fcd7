"""Graphs that run without torch or the model's code: ONNX, TorchScript, torch.export, each with its proof beside it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slimvlm.export.options import ExportOptions

if TYPE_CHECKING:
    from slimvlm.export.checks.verification import verify
    from slimvlm.export.job import export_checkpoint
    from slimvlm.export.running.evaluation import evaluate_export

__all__ = ["ExportOptions", "evaluate_export", "export_checkpoint", "verify"]

FILES = {
    "evaluate_export": "slimvlm.export.running.evaluation",
    "export_checkpoint": "slimvlm.export.job",
    "verify": "slimvlm.export.checks.verification",
}


def __getattr__(name: str) -> Any:  # what the file holds
    if name not in FILES:  # imported when asked for: options are read, and ONNX graphs verified, without torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(FILES[name]), name)
