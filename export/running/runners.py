"""Runtimes behind one interface (`generation.Runner`): sessions of ONNX Runtime, and whatever torch can call.

`run` takes and gives arrays. `call` is the same on values in the runtime's own form, for a loop that leaves them in
place: `value` makes one of a tensor, `tensor` a tensor of one, and `last` takes the logits [B, V] of the last token, as
something that has `argmax`, out of [B, S, V]. ONNX Runtime and torch are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from slimvlm.compress.errors import CheckpointError, DeviceError
from slimvlm.export.running.generation import Arrays, PortInfo, Runner
from slimvlm.export.running.manifest import Artifact, inside
from slimvlm.export.running.quiet import quiet
from slimvlm.export.running.sessions import Session, open_session, providers_of
from slimvlm.export.variants import VARIANTS

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")
Value = Any  # in a runtime's own form: a tensor, an array, an OrtValue
Binding = Any  # an onnxruntime.IOBinding; the package says nothing of its types
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
        self._ports: dict[str, tuple[tuple[PortInfo, ...], tuple[str, ...]]] = {}

    def session(self, graph: str) -> Session:
        """The InferenceSession of a graph."""
        if graph not in self._sessions:
            if graph not in self.files:
                raise CheckpointError(f"this export has no graph {graph}; it holds {', '.join(self.files)}")
            providers = providers_of(graph, *self._place)
            self._sessions[graph] = open_session(self.files[graph], providers, self._threads)
        return self._sessions[graph]

    def _asked(self, graph: str) -> tuple[tuple[PortInfo, ...], tuple[str, ...]]:
        """Its inputs and the names of its outputs: asked once, which can take longer than a run."""
        if graph not in self._ports:
            session = self.session(graph)
            taken = (PortInfo(port.name, ONNX_DTYPES[port.type], tuple(port.shape)) for port in session.get_inputs())
            self._ports[graph] = tuple(taken), tuple(port.name for port in session.get_outputs())
        return self._ports[graph]

    def inputs(self, graph: str) -> tuple[PortInfo, ...]:
        """What the graph takes."""
        return self._asked(graph)[0]

    def outputs(self, graph: str) -> tuple[str, ...]:
        """Names of what the graph gives."""
        return self._asked(graph)[1]

    def run(self, graph: str, feeds: Arrays) -> Arrays:
        """Outputs by name; inputs the graph does not have are left out, others cast to its dtype."""
        names = self.outputs(graph)
        return dict(zip(names, self.session(graph).run(names, fitting(self.inputs(graph), feeds)), strict=True))

    def together(self, runs: Sequence[Callable[[], Result]]) -> list[Result]:
        """What functions give that run graphs, in the order that takes least."""
        return [run() for run in runs]

    def call(self, graph: str, values: Mapping[str, Value]) -> Sequence[Value]:
        """Outputs in the order of their names; `values` are exactly what the graph takes, in its dtypes."""
        outputs: list[np.ndarray] = self.session(graph).run(self.outputs(graph), values)
        return outputs

    def value(self, tensor: Tensor) -> Value:
        """Of a contiguous tensor; they share their memory."""
        return tensor.numpy()

    def tensor(self, value: Value) -> Tensor:
        """Of an output; they share their memory."""
        import torch

        return torch.from_numpy(value)

    def last(self, logits: Value) -> Value:
        """Of the last token."""
        return logits[:, -1]


class BoundRunner(SessionRunner):
    """Sessions whose inputs and outputs are bound where they lie: on a GPU nothing goes to the host. Values are tensors
    on the device and what sessions gave; a graph has one binding, in which every call replaces what changed.
    """

    @cached_property
    def _nowhere(self) -> Tensor:
        """One element on the device."""
        import torch

        return torch.zeros(1, device=self._place[0].replace("tensorrt", "cuda"))

    @cached_property
    def _bindings(self) -> dict[str, tuple[Binding, dict[str, Value]]]:
        return {}

    @property
    def _where(self) -> tuple[str, int]:
        return self._nowhere.device.type, self._nowhere.device.index or 0

    def value(self, tensor: Tensor) -> Value:
        """Itself."""
        return tensor

    def tensor(self, value: Value) -> Tensor:
        """Of an output; they share their memory."""
        import torch

        return torch.from_dlpack(value)

    def last(self, logits: Value) -> Value:
        """Of the last token."""
        return self.tensor(logits)[:, -1]

    def call(self, graph: str, values: Mapping[str, Value]) -> Sequence[Value]:
        """As `SessionRunner.call`."""
        import torch

        session = self.session(graph)
        if graph not in self._bindings:
            self._bindings[graph] = session.io_binding(), {}
        binding, bound = self._bindings[graph]
        for name, value in values.items():
            if bound.get(name) is not value:
                self._bind(binding, name, value)
        self._bindings[graph] = binding, dict(values)  # what is bound must stay alive, and at its place
        binding.clear_binding_outputs()
        for name in self.outputs(graph):
            binding.bind_output(name, *self._where)
        if self._nowhere.is_cuda:  # the session has a stream of its own, and leaves it when all is done
            torch.cuda.current_stream(self._nowhere.device).synchronize()
        session.run_with_iobinding(binding)
        outputs: list[Value] = binding.get_outputs()
        return outputs

    def _bind(self, binding: Binding, name: str, value: Value) -> None:
        if not isinstance(value, type(self._nowhere)):  # what a session gave
            binding.bind_ortvalue_input(name, value)
            return
        pointer = value.data_ptr() or self._nowhere.data_ptr()  # a null pointer is refused, also for no elements
        element = np.dtype(str(value.dtype).removeprefix("torch."))
        binding.bind_input(name, *self._where, element, tuple(value.shape), pointer)


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

    def outputs(self, graph: str) -> tuple[str, ...]:
        """Names of what the graph gives."""
        return tuple(self.names[graph])

    def run(self, graph: str, feeds: Arrays) -> Arrays:
        """Outputs by name."""
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in fitting(self.inputs(graph), feeds).items()}
        with torch.inference_mode():
            outputs = self.call(graph, tensors)
        return {name: tensor.numpy() for name, tensor in zip(self.names[graph], outputs, strict=True)}

    def together(self, runs: Sequence[Callable[[], Result]]) -> list[Result]:
        """As `SessionRunner.together`."""
        return [run() for run in runs]

    def call(self, graph: str, values: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """As `SessionRunner.call`."""
        outputs = self.modules[graph](*(values[port.name] for port in self.ports[graph]))
        return outputs if isinstance(outputs, (tuple, list)) else (outputs,)

    def value(self, tensor: Tensor) -> Tensor:
        """Itself."""
        return tensor

    tensor = value

    def last(self, logits: Tensor) -> Tensor:
        """Of the last token."""
        return logits[:, -1]


Opened = SessionRunner | TorchRunner  # of the graphs of an export


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
) -> Opened:
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
        kind = SessionRunner if device == "cpu" else BoundRunner
        return kind(files, device, threads, VARIANTS[first.variant].dtype == "float16", engines)
    if device != "cpu":
        raise DeviceError(f"{first.backend} graphs were traced on the CPU and run there only; use --device cpu")
    ports = {artifact.graph: artifact.inputs for artifact in artifacts}
    outputs = {artifact.graph: [port.name for port in artifact.outputs] for artifact in artifacts}
    return TorchRunner({graph: load_module(first.format, path) for graph, path in files.items()}, ports, outputs)


def load_module(form: str, path: Path) -> Callable[..., Any]:
    """What calls the graph in a file of `torchscript`, `pt2` or `aoti`."""
    import torch

    with quiet():
        if form == "torchscript":
            return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-any-return]
        return torch.export.load(path).module() if form == "pt2" else torch._inductor.aoti_load_package(str(path))
