"""Runtimes behind one interface (`generation.Runner`): sessions of ONNX Runtime, and whatever torch can call.

ONNX Runtime is not imported here: who needs it (export, serve) opens the sessions. torch is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slimvlm.compress.errors import CheckpointError
from slimvlm.export.running.generation import Arrays, PortInfo
from slimvlm.export.running.manifest import Artifact
from slimvlm.export.running.quiet import quiet

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
        open_session: gives the `onnxruntime.InferenceSession` of a file.
    """

    def __init__(self, files: Mapping[str, Path], open_session: Callable[[Path], Any]) -> None:
        self.files, self._open = dict(files), open_session
        self._sessions: dict[str, Any] = {}

    def session(self, graph: str) -> Any:
        """The InferenceSession of a graph."""
        if graph not in self.files:
            raise CheckpointError(f"this export has no graph {graph}; it holds {', '.join(self.files)}")
        if graph not in self._sessions:
            self._sessions[graph] = self._open(self.files[graph])
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

        tensors = [torch.from_numpy(array) for array in fitting(self.inputs(graph), feeds).values()]
        with torch.inference_mode():
            outputs = self.modules[graph](*tensors)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return {name: tensor.numpy() for name, tensor in zip(self.names[graph], outputs, strict=True)}


def torch_files(files: Mapping[str, Path], artifacts: Sequence[Artifact]) -> TorchRunner:
    """Runs the files of one torch format: `torchscript`, `pt2` or `aoti`."""
    ports = {
        artifact.graph: [PortInfo(port["name"], port["dtype"], tuple(port["shape"])) for port in artifact.inputs]
        for artifact in artifacts
    }
    outputs = {artifact.graph: [port["name"] for port in artifact.outputs] for artifact in artifacts}
    load = LOADERS[artifacts[0].format]
    return TorchRunner({graph: load(path) for graph, path in files.items()}, ports, outputs)


def load_torchscript(path: Path) -> Any:
    """The traced module."""
    import torch

    with quiet():
        return torch.jit.load(str(path), map_location="cpu")


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


LOADERS: dict[str, Callable[[Path], Any]] = {
    "torchscript": load_torchscript,
    "pt2": load_pt2,
    "aoti": load_aoti,
}
