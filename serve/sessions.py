"""Sessions of ONNX Runtime on the device that was asked for, or a sentence that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimvlm.compress.errors import CheckpointError, DeviceError, MissingDependencyError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


def open_session(path: Path, device: str = "cpu", threads: int = 0) -> Any:
    """An `onnxruntime.InferenceSession`.

    Args:
        device: `cpu`, `cuda`, `cuda:N`, or `tensorrt:N`.
        threads: of one operator; 0 is the runtime's choice. They wait for work without spinning.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        DeviceError: the installed build has no provider for the device, or silently fell back to another.
        CheckpointError: the file is no graph that this build can open.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "ONNX graphs need ONNX Runtime: pip install 'slimvlm[onnx]' ('slimvlm[gpu]' for CUDA)"
        ) from None
    kind, _, index = device.partition(":")
    provider = PROVIDERS[kind]
    present = onnxruntime.get_available_providers()
    if provider not in present:
        raise DeviceError(
            f"this ONNX Runtime has no {provider} (only {', '.join(present)}); use --device cpu, or "
            "pip install 'slimvlm[gpu]'"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised as well; once is enough
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    chosen = provider if kind == "cpu" else (provider, {"device_id": int(index or 0)})
    try:
        session = onnxruntime.InferenceSession(path, sess_options=options, providers=[chosen])
    except Exception as error:  # the runtime's own exceptions have no common base
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path} cannot be opened by ONNX Runtime ({reason}); export it again") from error
    if (used := session.get_providers()[0]) != provider:
        raise DeviceError(f"ONNX Runtime took {used} where {provider} was asked for; check its CUDA libraries")
    return session
