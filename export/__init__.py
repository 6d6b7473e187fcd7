"""Graphs that run without torch or the model's code: ONNX, TorchScript, torch.export, each with its proof beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from slimvlm.compress.progress import Progress, silent
from slimvlm.export.options import ExportOptions

if TYPE_CHECKING:
    from slimvlm.export.checks.verification import Verification
    from slimvlm.export.job import ExportResult

__all__ = ["ExportOptions", "export_checkpoint", "verify"]


def export_checkpoint(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ExportOptions,
    progress: Progress = silent,
) -> ExportResult:
    """Exports a checkpoint (dense, per-layer or stock layout, or a hub name) into the folder `out`.

    Raises:
        SlimvlmError: refused: unsupported model, option, missing package, an occupied or full `out`.
        CheckFailedError: a graph differs from torch; the files are kept and marked, the result is in the error.
    """
    from slimvlm.export.packages import require_packages

    require_packages(options)
    from slimvlm.export.job import run_export

    return run_export(os.fspath(folder), Path(out), options, progress)


def verify(folder: str | os.PathLike[str]) -> Verification:
    """Checks an exported folder here: hashes of all files, and the stored sample through every runtime present.

    It runs what is in the folder; a program compiled ahead of time (`.aoti.pt2`) is native code of whoever made it.

    Raises:
        CheckpointError: no export, or one whose manifest names files outside it.
        CheckFailedError: a file changed, or this machine's answers are not torch's.
    """
    from slimvlm.export.checks.verification import verify_folder

    return verify_folder(Path(folder))
