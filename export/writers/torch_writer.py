"""TorchScript, torch.export and AOTInductor files of a graph; `running/runners.py` loads them."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from slimvlm.compress.errors import MissingDependencyError, UnsupportedModelError
from slimvlm.export.graphs.graph import Graph
from slimvlm.export.running.quiet import quiet
from slimvlm.export.writers.tracing import exported_program, first_line


def write_torchscript(graph: Graph, path: Path) -> None:
    """A traced module that `torch.jit.load` runs without this package or transformers.

    Raises:
        UnsupportedModelError: the graph cannot be traced.
    """
    try:
        with quiet(), torch.no_grad():
            traced = torch.jit.trace(graph.module, graph.samples, strict=False, check_trace=False)
    except Exception as error:  # whatever the traced code raises
        raise UnsupportedModelError(f"{graph.name} cannot be traced to TorchScript ({first_line(error)})") from error
    _save(lambda: torch.jit.save(traced, str(path)), path)


def write_pt2(graph: Graph, path: Path, aoti: bool) -> None:
    """A torch.export program with varying axes; with `aoti` also `<name>.aoti.pt2`, compiled for this machine.

    Raises:
        UnsupportedModelError: the graph cannot be exported or compiled.
        MissingDependencyError: `aoti` without a C++ compiler.
    """
    if aoti and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise MissingDependencyError("--aoti needs a C++ compiler (g++ or clang++); install one or leave --aoti out")
    try:
        with quiet():
            program = exported_program(graph)
            if aoti:
                torch._inductor.aoti_compile_and_package(program, package_path=str(compiled_name(path)))
    except OSError:
        raise
    except Exception as error:  # whatever the traced code or the compiler raises
        raise UnsupportedModelError(f"{graph.name} cannot be exported by torch.export ({first_line(error)})") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    _save(lambda: torch.export.save(program, path), path)


def _save(write: Callable[[], None], path: Path) -> None:
    """Runs `write`; torch reports a full disk as a RuntimeError."""
    try:
        with quiet():
            write()
    except RuntimeError as error:
        raise OSError(errno.EIO, first_line(error), str(path)) from error


def compiled_name(path: Path) -> Path:
    """Where the compiled form of a `.pt2` stands."""
    return path.with_suffix(".aoti.pt2")
