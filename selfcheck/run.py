"""The checks in their order, each on its own."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from slimvlm.compress.errors import MissingDependencyError
from slimvlm.compress.processes import pick_device
from slimvlm.kernels import FOLDERS
from slimvlm.selfcheck.ground import Ground
from slimvlm.selfcheck.outcome import FAIL, PASS, SKIP, Outcome, Report, SkippedError, WrongError
from slimvlm.serve.options import ONNX, TORCH

# Name -> module of this package, function, what else it is given. What cannot be imported fails alone.
CHECKS: Mapping[str, tuple[str, ...]] = {
    "versions": ("machine", "check_versions"),
    "device": ("machine", "check_device"),
    "compiler": ("machine", "check_compiler"),
    "memory": ("machine", "check_memory"),
    "energy": ("machine", "check_energy"),
    "triton": ("kernels", "check_triton"),
    **{f"kernel {name}": ("kernels", "check_kernel", name) for name in dict.fromkeys(FOLDERS.values())},
    "calibration": ("kernels", "check_calibration"),
    "plan": ("job", "check_plan"),
    "slice and refit": ("job", "check_slice"),
    "recovery": ("job", "check_recovery"),
    "reload": ("job", "check_reload"),
    "export": ("running", "check_export"),
    "profile torch": ("running", "check_profile", TORCH),
    "profile onnx": ("running", "check_profile", ONNX),
    "clock torch": ("running", "check_clock", TORCH),
    "clock onnx": ("running", "check_clock", ONNX),
    "other GPU": ("several", "check_other_gpu"),
    "two processes": ("several", "check_two_processes"),
}


def selfcheck(device: str, tell: Callable[[Outcome], None] | None = None) -> Report:
    """Run all checks.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        tell: called with every outcome as it comes.

    Raises:
        DeviceError: the device is not there.
    """
    chosen = pick_device(device)
    outcomes = []
    with TemporaryDirectory(prefix="slimvlm-selfcheck-") as folder:
        ground = Ground(chosen, Path(folder))
        for name, where in CHECKS.items():
            outcomes.append(run_check(name, where, ground))
            if tell is not None:
                tell(outcomes[-1])
    return Report(str(chosen), tuple(outcomes), ground.facts)


def run_check(name: str, where: tuple[str, ...], ground: Ground) -> Outcome:
    """One check; whatever it raises is its outcome. `where` as in CHECKS."""
    module, function, *given = where
    started, trace = time.perf_counter(), None
    try:
        verdict, detail = PASS, getattr(importlib.import_module(f"{__package__}.{module}"), function)(ground, *given)
        ground.made.add(name)
    except (SkippedError, MissingDependencyError) as missing:
        verdict, detail = SKIP, str(missing)
    except WrongError as wrong:
        verdict, detail = FAIL, str(wrong)
    except Exception as error:  # a check must not end the others
        verdict, detail, trace = FAIL, _sentence(error), traceback.format_exc()
    return Outcome(name, verdict, time.perf_counter() - started, detail, trace)


def _sentence(error: Exception) -> str:
    """The first line of an error that was not expected, and its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
