"""One model in one process: loaded, fed, timed; what it took of memory and energy."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.checkpoint import build_meta, load_model
from slimvlm.compress.models.computing import DTYPES, cast
from slimvlm.compress.models.experts import put_together
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.generation import Arrays
from slimvlm.serve.backends.backend import Backend, Clock, clock_of, time_embedding, time_generation
from slimvlm.serve.backends.graph_backend import GraphBackend
from slimvlm.serve.backends.torch_backend import Model, TorchBackend
from slimvlm.serve.measuring.device import claim
from slimvlm.serve.measuring.memory import Gpu, Held, held_bytes, peak_bytes, reset_peak
from slimvlm.serve.options import ONNX, TORCH, split_backend
from slimvlm.serve.profile import Memory

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Source:
    """What is loaded, and to run on what.

    Attributes:
        folder: checkpoint (backend torch) or export.
        backend: as `options.BACKENDS`, with a variant.
        device: torch's name of it; `provider`: that of ONNX Runtime's device (`cpu`, `cuda:0`, `tensorrt:0`).
        dtype: of the torch model, as `options.DTYPES`.
        gpu: NVML's name of the device, if it is one.
        engines: folder for what TensorRT builds of this model.
    """

    folder: str
    backend: str
    device: str
    provider: str
    threads: int
    dtype: str
    trust_remote_code: bool = False
    gpu: str | None = None
    engines: str | None = None


class Bench:
    """One loaded model and one workload at a time."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.device = torch.device(source.device)  # picked by the caller; `claim` makes it the current one
        self.gpu = Gpu(self.device, source.gpu)
        self.backend: Backend  # once it is loaded
        self.dual = False
        self.images = True
        self._before = self._loaded = Held(0, 0)
        self._driver = 0

    def load(self) -> dict[str, float | str]:
        """Opens the model; gives `seconds`, the checks of its files included, and its `dtype`."""
        torch.set_num_threads(self.source.threads)
        claim(self.device)
        _import_all(self.source)
        reset_peak()
        self._before = held_bytes()
        used, started = self.gpu.used_bytes(), time.perf_counter()
        self.backend, self.dual, dtype = open_backend(self.source)
        self._wait()
        seconds = time.perf_counter() - started
        self._loaded = held_bytes()
        self._count_driver(used)
        return {"seconds": seconds, "dtype": dtype}

    def place(self, arrays: Arrays) -> None:
        """Takes the inputs of a workload."""
        self.images = "pixel_values" in arrays
        self.backend.place(arrays)

    def turn(self, new_tokens: int, repeats: int) -> list[dict[str, float]]:
        """Seconds per phase of so many runs."""
        used, clock = self.gpu.used_bytes(), clock_of(self.device)
        found = [self._run(clock, new_tokens) for _ in range(repeats)]
        self._count_driver(used)
        return found

    def tokens(self, new_tokens: int) -> np.ndarray:
        """What is generated, int64 [B, T]."""
        timed = time_generation(self.backend, clock_of(self.device), new_tokens, self.images)
        return timed.tokens.cpu().numpy()

    def joules_per_token(self, new_tokens: int, rows: int, seconds: float) -> float | None:
        """Over at least so many seconds of generating `rows` answers at once."""
        clock, generated = clock_of(self.device), 0
        first, end = self.gpu.joules(), time.perf_counter() + seconds
        if first is None:
            return None
        while time.perf_counter() < end:
            self._run(clock, new_tokens)
            generated += new_tokens * rows
        last = self.gpu.joules()
        return None if last is None else (last - first) / generated

    def memory(self) -> Memory:
        """Of this process so far."""
        peak = peak_bytes()
        host = {
            "host_loaded_bytes": max(0, self._loaded.own - self._before.own),
            "host_mapped_bytes": max(0, self._loaded.mapped - self._before.mapped),
            "host_peak_bytes": None if peak is None else max(0, peak - self._before.resident),
        }
        if self.device.type != "cuda":
            return Memory(**host)
        device = {"device_driver_bytes": self.gpu.own_bytes() or self._driver or None}
        if split_backend(self.source.backend)[0] == TORCH:  # other runtimes have allocators of their own
            device["device_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
            device["device_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
        return Memory(**host, **device)

    def _run(self, clock: Clock, new_tokens: int) -> dict[str, float]:
        if self.dual:
            return time_embedding(self.backend, clock)
        return time_generation(self.backend, clock, new_tokens, self.images).seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _count_driver(self, before: int | None) -> None:
        """Other processes wait during a call, so what the device's use grew by is this one's."""
        after = self.gpu.used_bytes()
        if before is not None and after is not None:
            self._driver += after - before


def _import_all(source: Source) -> None:
    """What code takes is not the model's: import it before memory is counted."""
    name, variant = split_backend(source.backend)
    if name == TORCH:
        build_meta(source.folder, source.trust_remote_code, variant)
    elif name == ONNX:
        with suppress(ImportError):  # refused with a sentence when a session is opened
            import onnxruntime  # noqa: F401


def open_backend(source: Source) -> tuple[Backend, bool, str]:
    """The backend, whether it is a dual encoder, and its dtype's name.

    Raises:
        SlimvlmError: it cannot be opened, with the reason.
    """
    device, (name, variant) = torch.device(source.device), split_backend(source.backend)
    if name == TORCH:
        dtype = None if source.dtype == "auto" else DTYPES[source.dtype]
        loaded = load_model(source.folder, device=device, trust_remote_code=source.trust_remote_code, form=variant)
        put_together(loaded.model)
        if dtype is None and device.type == "cpu" and loaded.model.dtype == torch.float16:
            dtype = torch.float32  # which is what fp16 weights are computed in on a CPU
        model: Model = loaded.model if dtype is None else cast(loaded.model, dtype)
        return TorchBackend(model, loaded.family), loaded.family.contrastive, variant or NAMES[model.dtype]
    export = Exported.open(Path(source.folder))
    key = export.backend(name, variant)
    if key is None:
        held = ", ".join(export.graphs)
        raise UnsuitableOptionError(f"{export.folder} has no {source.backend} graphs; it holds {held}")
    where = source.provider if name == ONNX else source.device
    if source.engines is not None and where.startswith("tensorrt"):
        Path(source.engines).mkdir(parents=True, exist_ok=True)
    graphs = export.runner(key, where, source.threads, source.engines)
    for artifact in export.graphs[key]:
        graphs.inputs(artifact.graph)  # opens it
    prompting = export.manifest.generation
    return GraphBackend(graphs, prompting, device), prompting is None, export.graphs[key][0].variant
