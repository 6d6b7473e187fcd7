"""What every exporter of torch needs: a graph as a program with its varying axes, and one line of what went wrong."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from slimvlm.export.graphs.graph import TOTAL, Graph
from slimvlm.export.graphs.sizes import fake_weights

_PROGRAMS: WeakKeyDictionary[nn.Module, torch.export.ExportedProgram] = WeakKeyDictionary()  # of living graphs

DERIVED = (TOTAL,)  # follows from other axes; torch.export finds the relation by itself


def first_line(error: BaseException, width: int = 200) -> str:
    """What an exception says, in one line; exporters put a report around the one sentence that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = next((line for line in lines if line.startswith("<class ")), lines[0] if lines else "")
    return f"{type(error).__name__}: {cause}"[:width]


def dynamic_shapes(graph: Graph) -> tuple[Any, ...]:
    """The axes of a graph as torch.export wants them: by parameter, the variable ones (`*past`) as one tuple."""
    dim = torch.export.Dim
    names = {name for port in graph.inputs for name in port.axes.values() if name not in DERIVED}
    named: dict[str, Any] = {name: dim(name, max=graph.longest.get(name)) for name in names}
    named |= {name: unit * dim(f"{name}_over_{unit}") for name, unit in graph.unit.items()}
    shapes = [{axis: named.get(name, dim.DYNAMIC) for axis, name in port.axes.items()} for port in graph.inputs]
    parameters = list(inspect.signature(graph.module.forward).parameters.values())
    if parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        return tuple(shapes)
    first = len(parameters) - 1
    return (*shapes[:first], tuple(shapes[first:]))


def exported_program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph by torch.export, made once for all formats that are written from it."""
    if graph.module not in _PROGRAMS:
        # An axis of several rows an image: else one image is taken for another case than two.
        oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=bool(graph.unit))  # type: ignore[attr-defined]
        with torch.no_grad(), oblivious, fake_weights(graph.module):
            _PROGRAMS[graph.module] = torch.export.export(
                graph.module, graph.samples, dynamic_shapes=dynamic_shapes(graph), strict=False
            )
    return _PROGRAMS[graph.module]
