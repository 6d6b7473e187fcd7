"""ONNX graphs that do not fit into memory, run a part at a time: consecutive operators with the weights they read.

What a part gives goes into the next one, and its session is gone by then. The operators are those of the whole graph;
only what the runtime would have fused across the border of two parts is computed by each on its own. Several runs go
through a part together, which is then read once for all of them: each is a coroutine that stops at every part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar, cast  # whatever a run gives

import numpy as np
import onnx
from greenlet import getcurrent, greenlet

from slimvlm.export.running.generation import Arrays, PortInfo
from slimvlm.export.running.runners import SessionRunner, fitting
from slimvlm.export.running.sessions import open_session, providers_of

Result = TypeVar("Result")
PART_BYTES = 2**28  # of weights; an operator that reads more is a part of its own


@dataclass(frozen=True, slots=True)
class Part:
    """Operators, the names of what they read (weights, values) and of what others want of them."""

    nodes: tuple[onnx.NodeProto, ...]
    weights: frozenset[str]
    takes: frozenset[str]
    gives: frozenset[str]


class _Run:
    """A function that runs graphs, stopped at a part.

    Attributes:
        at, given: the part that it waits for and what goes into it; None: it has ended, with a `result`.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self._inner = greenlet(run)
        self.at: Part | None = None
        self.given: Arrays = {}
        self.result: Any = None

    def go(self, *found: Arrays) -> None:
        """On to the next part or to the end, with what the one gave where it is."""
        self._note(self._inner.switch(*found))

    def fail(self, error: Exception) -> None:
        """On with an error."""
        self._note(self._inner.throw(error))

    def close(self) -> None:
        """End it where it is."""
        self._inner.throw()

    def _note(self, found: Any) -> None:
        if self._inner.dead:
            self.at, self.given, self.result = None, {}, found
        else:
            self.at, self.given = found


class PartedRunner(SessionRunner):
    """As `SessionRunner`, on the CPU, with one part of one graph in memory."""

    _stopping = False  # whether what runs now can wait for others

    @cached_property
    def _graphs(self) -> dict[str, onnx.ModelProto]:
        """Without the weights that stand apart."""
        return {name: onnx.load(path, load_external_data=False) for name, path in self.files.items()}

    def _asked(self, graph: str) -> tuple[tuple[PortInfo, ...], tuple[str, ...]]:
        held = self._graphs[graph].graph
        return tuple(map(_port, held.input)), tuple(value.name for value in held.output)

    @cached_property
    def _parts(self) -> dict[str, list[Part]]:
        return {name: parts_of(model.graph) for name, model in self._graphs.items()}

    def run(self, graph: str, feeds: Arrays) -> Arrays:
        """As `SessionRunner.run`."""
        if not self._stopping:
            return self.together([partial(self.run, graph, feeds)])[0]
        names, values = self.outputs(graph), dict(fitting(self.inputs(graph), feeds))
        parts = self._parts[graph]
        for place, part in enumerate(parts):
            given = {name: values[name] for name in part.takes}
            values |= cast(greenlet, getcurrent().parent).switch((part, given))
            needed = set(names).union(*(later.takes for later in parts[place + 1 :]))
            values = {name: value for name, value in values.items() if name in needed}
        return {name: values[name] for name in names}

    def together(self, runs: Sequence[Callable[[], Result]]) -> list[Result]:
        """As `SessionRunner.together`; all go through a part before the next one is read."""
        stopped, self._stopping = [_Run(run) for run in runs], True
        try:
            for run in stopped:
                run.go()
            while any(run.at is not None for run in stopped):
                for graph, parts in self._parts.items():
                    for part in parts:
                        self._compute(graph, part, [run for run in stopped if run.at is part])
        finally:
            self._stopping = False
            for run in stopped:
                run.close()
        return [run.result for run in stopped]

    def _compute(self, graph: str, part: Part, runs: Sequence[_Run]) -> None:
        """What a part gives to runs that wait for it."""
        session, wanted = None, sorted(part.gives)
        for run in runs:
            try:
                if session is None:
                    alone = _model(self._graphs[graph], part, run.given)
                    session = open_session(self.files[graph], providers_of(graph, "cpu"), self._threads, alone)
                found = dict(zip(wanted, session.run(wanted, run.given), strict=True))
            except Exception as error:  # of the runtime: whoever asked is told
                run.fail(error)
            else:
                run.go(found)


def parts_of(graph: onnx.GraphProto) -> list[Part]:
    """The graph cut before every operator with which more than PART_BYTES of weights would be read."""
    sizes = {weight.name: _bytes(weight) for weight in graph.initializer}
    groups: list[list[onnx.NodeProto]] = []
    held: set[str] = set()
    for node in graph.node:
        read = _read(node) & sizes.keys()
        if not groups or sum(sizes[name] for name in held | read) > PART_BYTES:
            groups.append([])
            held = set()
        groups[-1].append(node)
        held |= read
    values = {value.name for value in graph.input} | {name for node in graph.node for name in node.output}
    wanted, parts = {value.name for value in graph.output}, list[Part]()
    for nodes in reversed(groups):
        made = {name for node in nodes for name in node.output}
        used = set().union(*map(_read, nodes))
        takes = (used & values) - made
        parts.append(Part(tuple(nodes), frozenset(used & sizes.keys()), frozenset(takes), frozenset(wanted & made)))
        wanted |= takes
    return parts[::-1]


def _read(node: onnx.NodeProto) -> set[str]:
    """The names that an operator reads, also those that a graph inside of it does."""
    graphs = (graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs))
    return set(node.input).union(*(_read(inner) for graph in graphs for inner in graph.node)) - {""}


def _bytes(weight: onnx.TensorProto) -> int:
    apart = {entry.key: entry.value for entry in weight.external_data}
    return int(apart.get("length", weight.ByteSize()))


def _model(whole: onnx.ModelProto, part: Part, given: Arrays) -> bytes:
    """The part as a graph of its own, whose weights stay where they are."""
    graph = onnx.helper.make_graph(
        part.nodes,
        whole.graph.name,
        [_typed(name, array) for name, array in given.items()],
        [onnx.ValueInfoProto(name=name) for name in sorted(part.gives)],
        [weight for weight in whole.graph.initializer if weight.name in part.weights],
    )
    model = onnx.ModelProto(ir_version=whole.ir_version, graph=graph)
    model.opset_import.extend(whole.opset_import)
    model.functions.extend(whole.functions)
    alone: bytes = model.SerializeToString()
    return alone


def _typed(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim)


def _port(value: onnx.ValueInfoProto) -> PortInfo:
    held = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in held.shape.dim)
    return PortInfo(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(held.elem_type)), shape)
