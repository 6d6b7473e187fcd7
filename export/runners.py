"""Runtimes behind one interface (`generation.Runner`): torch modules, ONNX Runtime, TorchScript, torch.export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimvlm.compress.generation import Arrays, PortInfo, Runner
from slimvlm.compress.manifest import Artifact, inside

ONNX_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRunner:
    """ONNX files in ONNX Runtime; a session is opened when its graph is first run.

    Args:
        files: file per graph name.
        providers: execution providers, best first.
        threads: of one operator; 0 is the runtime's choice.
    """

    def __init__(
        self, files: Mapping[str, Path], providers: Sequence[str] = ("CPUExecutionProvider",), threads: int = 0
    ) -> None:
        self.files, self.providers, self.threads = dict(files), list(providers), threads
        self._sessions: dict[str, Any] = {}

    def session(self, graph: str) -> Any:
        """The InferenceSession of a graph."""
        if graph not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.log_severity_level = 4  # errors are raised as well; once is enough
            self._sessions[graph] = onnxruntime.InferenceSession(
                self.files[graph], sess_options=options, providers=self.providers
            )
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
        return dict(zip(names, session.run(names, _fitting(self.inputs(graph), feeds)), strict=True))


def _port(node: Any) -> PortInfo:
    return PortInfo(node.name, ONNX_DTYPES[node.type], tuple(node.shape))


def _fitting(ports: Sequence[PortInfo], feeds: Arrays) -> Arrays:
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
        modules: Mapping[str, Any],
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

        tensors = [torch.from_numpy(array) for array in _fitting(self.inputs(graph), feeds).values()]
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


def runner_of(folder: Path, artifacts: Sequence[Artifact]) -> Runner:
    """Runs the artifacts of one format and variant.

    Raises:
        CheckpointError: a file name leaves the folder.
    """
    files = {artifact.graph: inside(folder, artifact.file) for artifact in artifacts}
    form = artifacts[0].format
    if form == "onnx":
        return OnnxRunner(files)
    from slimvlm.export.torch_writer import LOADERS

    ports = {
        artifact.graph: [PortInfo(port["name"], port["dtype"], tuple(port["shape"])) for port in artifact.inputs]
        for artifact in artifacts
    }
    outputs = {artifact.graph: [port["name"] for port in artifact.outputs] for artifact in artifacts}
    return TorchRunner({graph: LOADERS[form](path) for graph, path in files.items()}, ports, outputs)
