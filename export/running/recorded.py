"""The runners of `compress.runners` as an export needs them: ONNX on the CPU, one format and variant, recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimvlm.export.running.generation import Arrays, PortInfo, Runner
from slimvlm.export.running.manifest import Artifact, inside
from slimvlm.export.running.runners import SessionRunner, torch_files


class OnnxRunner(SessionRunner):
    """ONNX files in ONNX Runtime on the CPU.

    Args:
        files: file per graph name.
        threads: of one operator; 0 is the runtime's choice.
    """

    def __init__(self, files: Mapping[str, Path], threads: int = 0) -> None:
        super().__init__(files, lambda path: _session(path, threads))


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well; once is enough
    return onnxruntime.InferenceSession(path, sess_options=options, providers=["CPUExecutionProvider"])


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
    return OnnxRunner(files) if artifacts[0].format == "onnx" else torch_files(files, artifacts)
