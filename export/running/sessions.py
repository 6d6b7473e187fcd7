"""Sessions of ONNX Runtime on the device that was asked for, or a sentence that says why not.

On a GPU fp32 means fp32, as torch has it: TF32 is off. TensorRT runs graphs whose shapes stay: for every length of the
cache, which begins empty, it would build an engine anew, so the graphs of a decoder's steps are left to CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimvlm.compress.errors import CheckpointError, DeviceError, MissingDependencyError
from slimvlm.export.running.names import DECODER, EMBED

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
GROWING = (EMBED, DECODER)  # graphs whose inputs have another shape with every token
NO_TENSORRT = (
    f"tensorrt: {' and '.join(GROWING)} run on CUDA: their shapes grow with every token, and TensorRT would build an "
    "engine for each"
)
NO_RUNTIME = "ONNX graphs need ONNX Runtime: pip install 'slimvlm[onnx]' ('slimvlm[gpu]' for CUDA)"
Provider = tuple[str, dict[str, str]]
Session = Any  # an onnxruntime.InferenceSession; the package says nothing of its types


class UnreadableGraphError(CheckpointError):
    """A file is no graph that this build of ONNX Runtime can open."""


def providers_of(graph: str, device: str, half: bool = False, engines: str | None = None) -> list[Provider]:
    """Execution providers with their options, what is to run first; each takes what the one before cannot.

    Args:
        graph: its name in the export.
        device: `cpu`, `cuda`, `cuda:N`, or `tensorrt:N`.
        half: whether the weights are fp16.
        engines: folder where TensorRT keeps what it built; it knows graphs by name, so one folder per model.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return [(PROVIDERS["cpu"], {})]
    cuda = PROVIDERS["cuda"], {"device_id": index or "0", "use_tf32": "0"}
    if kind == "cuda" or graph in GROWING:
        return [cuda]
    options = {"device_id": index or "0", "trt_fp16_enable": str(int(half))}
    if engines is not None:
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": engines}
        options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": engines}
    return [(PROVIDERS[kind], options), cuda]


def open_session(path: Path, providers: Sequence[Provider], threads: int = 0, graph: bytes | None = None) -> Session:
    """An `onnxruntime.InferenceSession`.

    Args:
        graph: to open in the place of that in the file, beside which its weights are.
        providers: of `providers_of`.
        threads: of one operator; 0 is the runtime's choice. They wait for work without spinning.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        DeviceError: the installed build has no provider for the device, or silently fell back to another.
        UnreadableGraphError: the file is no graph that this build can open.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(NO_RUNTIME) from None
    present = onnxruntime.get_available_providers()
    if missing := [name for name, _ in providers if name not in present]:
        raise DeviceError(
            f"this ONNX Runtime has no {missing[0]} (only {', '.join(present)}); use --device cpu, or "
            "pip install 'slimvlm[gpu]'"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well; once is enough
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if graph is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = onnxruntime.InferenceSession(graph or path, sess_options=options, providers=list(providers))
    except Exception as error:  # the runtime's own exceptions have no common base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnreadableGraphError(f"{path} cannot be opened by ONNX Runtime ({reason}); export it again") from error
    asked = [name for name, _ in providers]
    if (used := session.get_providers()[: len(asked)]) != asked:
        raise DeviceError(
            f"ONNX Runtime took {', '.join(used)} where {', '.join(asked)} was asked for; check its CUDA libraries"
        )
    return session
