"""Runtimes behind one interface (`generation.Runner`): sessions of ONNX Runtime, and whatever torch can call.

ONNX Runtime and torch are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimvlm.compress.errors import CheckpointError, DeviceError
from slimvlm.export.running.generation import Arrays, PortInfo, Runner
from slimvlm.export.running.manifest import Artifact, inside
from slimvlm.export.running.quiet import quiet
from slimvlm.export.running.sessions import Session, open_session, providers_of
from slimvlm.export.variants import VARIANTS

ONNX_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class SessionRunner:
    """ONNX files; a session is opened when its graph is first run.

    Args:
        files: file per graph name.
        device, half, engines: as `providers_of` takes them.
        threads: of one operator; 0 is the runtime's choice.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        device: str = "cpu",
        threads: int = 0,
        half: bool = False,
        engines: str | None = None,
    ) -> None:
        self.files, self._place, self._threads = dict(files), (device, half, engines), threads
        self._sessions: dict[str, Session] = {}

    def session(self, graph: str) -> Session:
        """The InferenceSession of a graph."""
        if graph not in self.files:
            raise CheckpointError(f"this export has no graph {graph}; it holds {', '.join(self.files)}")
        if graph not in self._sessions:
            providers = providers_of(graph, *self._place)
            self._sessions[graph] = open_session(self.files[graph], providers, self._threads)
        return self._sessions[graph]

    def inputs(self, graph: str) -> tuple[PortInfo, ...]:
        """What the graph takes."""
        return tuple(map(_port, self.session(graph).get_inputs()))

    def outputs(self, graph: str) -> tuple[PortInfo, ...]:
        """What the graph gives."""
        return tuple(map(_port, self.session(graph).get_outputs()))

    def run(self, graph: str, feeds: Arrays) -> Arrays:
        """Outputs by name; inputs the graph does not have are left out, others cast to its dtype."""
        session = self.session(graph)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, fitting(self.inputs(graph), feeds)), strict=True))


def _port(node: Any) -> PortInfo:
    return PortInfo(node.name, ONNX_DTYPES[node.type], tuple(node.shape))


def fitting(ports: Sequence[PortInfo], feeds: Arrays) -> Arrays:
    """Of `feeds` what the ports take, contiguous and in their dtypes, in their order."""
    return {port.name: np.ascontiguousarray(feeds[port.name].astype(port.dtype, copy=False)) for port in ports}


class TorchRunner:
    """Callables on tensors: the modules that are exported, TorchScript modules, torch.export programs.

    Args:
        modules: callable per graph name.
        ports: inputs per graph name, in the order of the callable's parameters.
        outputs: names of the outputs per graph name.
    """

    def __init__(
        self,
        modules: Mapping[str, Callable[..., Any]],
        ports: Mapping[str, Sequence[PortInfo]],
        outputs: Mapping[str, Sequence[str]],
    ) -> None:
        self.modules, self.ports, self.names = dict(modules), ports, outputs

    def inputs(self, graph: str) -> tuple[PortInfo, ...]:
        """What the graph takes."""
        return tuple(self.ports[graph])

    def run(self, graph: str, feeds: Arrays) -> Arrays:
        """Outputs by name."""
        import torch

        tensors = [torch.from_numpy(array) for array in fitting(self.inputs(graph), feeds).values()]
        with torch.inference_mode():
            outputs = self.modules[graph](*tensors)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return {name: tensor.numpy() for name, tensor in zip(self.names[graph], outputs, strict=True)}


class Recorder:
    """Runs another runner and keeps the first `most` calls of every graph: what went in and what came out."""

    def __init__(self, runner: Runner, most: int = 2) -> None:
        self.runner, self.most = runner, most
        self.calls: list[tuple[str, Arrays, Arrays]] = []

    def inputs(self, graph: str) -> tuple[PortInfo, ...]:
        """As the inner runner's."""
        return self.runner.inputs(graph)

    def run(self, graph: str, feeds: Arrays) -> Arrays:
        """As the inner runner's."""
        outputs = self.runner.run(graph, feeds)
        if sum(name == graph for name, _, _ in self.calls) < self.most:
            taken = {port.name: feeds[port.name] for port in self.inputs(graph)}
            self.calls.append((graph, taken, outputs))
        return outputs


def runner_of(
    folder: Path, artifacts: Sequence[Artifact], device: str = "cpu", threads: int = 0, engines: str | None = None
) -> SessionRunner | TorchRunner:
    """Runs the artifacts of one format and variant.

    Args:
        device, threads, engines: of ONNX graphs, as `SessionRunner` takes them.

    Raises:
        CheckpointError: a file name leaves the folder.
        DeviceError: graphs of torch are run on the CPU only, on which they were traced.
    """
    first = artifacts[0]
    files = {artifact.graph: inside(folder, artifact.file) for artifact in artifacts}
    if first.format == "onnx":
        return SessionRunner(files, device, threads, VARIANTS[first.variant].dtype == "float16", engines)
    if device != "cpu":
        raise DeviceError(f"{first.backend} graphs were traced on the CPU and run there only; use --device cpu")
    ports = {artifact.graph: artifact.inputs for artifact in artifacts}
    outputs = {artifact.graph: [port.name for port in artifact.outputs] for artifact in artifacts}
    return TorchRunner({graph: LOADERS[first.format](path) for graph, path in files.items()}, ports, outputs)


def load_torchscript(path: Path) -> Callable[..., Any]:
    """The traced module."""
    import torch

    with quiet():
        module: Callable[..., Any] = torch.jit.load(str(path), map_location="cpu")
    return module


def load_pt2(path: Path) -> Callable[..., Any]:
    """The program as a callable module."""
    import torch

    with quiet():
        return torch.export.load(path).module()


def load_aoti(path: Path) -> Callable[..., Any]:
    """The compiled program."""
    import torch

    with quiet():
        return torch._inductor.aoti_load_package(str(path))


LOADERS: dict[str, Callable[[Path], Callable[..., Any]]] = {
    "torchscript": load_torchscript,
    "pt2": load_pt2,
    "aoti": load_aoti,
}
