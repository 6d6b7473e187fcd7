"""The slim model run: exported, profiled in processes of its own, and timed by the device's clock and by the host's."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from slimvlm.demo import SAMPLES
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.packages import require_packages
from slimvlm.export.running.runtimes import installed_runtimes
from slimvlm.selfcheck.ground import Ground
from slimvlm.selfcheck.job import RUN
from slimvlm.selfcheck.outcome import SkippedError, WrongError
from slimvlm.serve.measuring.bench import Bench, Source
from slimvlm.serve.measuring.memory import gpu_name
from slimvlm.serve.measuring.workload import InputMaker, grid
from slimvlm.serve.options import ONNX, TORCH, ProfileOptions
from slimvlm.serve.profile import MEASURED
from slimvlm.serve.profiling import profile_models
from slimvlm.serve.targets import find_target

TOKENS, REPEATS = 16, 10
CLOCKS_AGREE = 0.8, 1.05  # share of the host's seconds that the device's events may count


def check_export(ground: Ground) -> str:
    """ONNX graphs of the slim model, held against torch by the export itself."""
    options = ExportOptions(formats=("onnx",), data=SAMPLES / "val.jsonl", samples=4, max_new_tokens=4)
    require_packages(options.checked())
    ground.need("recovery")
    run = ground.folder / RUN
    manifest = export_checkpoint(str(run / "model"), run / "export", options).manifest
    return f"{len(manifest.artifacts)} graphs equal torch, {len(manifest.checks)} comparisons of whole answers passed"


def check_profile(ground: Ground, backend: str) -> str:
    """A short profile: a process of its own, every phase, its memory and energy."""
    _need_model(ground, backend)
    options = _options(backend, ground)
    cell = profile_models(options).cells[0]
    if cell.status != MEASURED:
        raise WrongError(f"the cell is {cell.status}: {cell.reason}")
    run = cell.runs["slim"]
    if bad := [phase for phase, seconds in run.medians.items() if not seconds > 0]:
        raise WrongError(f"the seconds of {', '.join(bad)} are not above zero")
    said = [f"{phase} {1000 * run.medians[phase]:.2f} ms" for phase in ("ttft", "tpot")]
    memory = run.memory.device_driver_bytes if ground.gpu else run.memory.host_peak_bytes
    if memory is not None:
        said.append(f"{memory / 2**20:.0f} MiB")
    if run.energy_joules_per_token is not None:
        said.append(f"{run.energy_joules_per_token:.2g} J per token")
    return ", ".join([*said, cell.dtype])


def check_clock(ground: Ground, backend: str) -> str:
    """Events in the device's stream must count what the host's clock counts around them."""
    ground.need_gpu("a CPU is timed by the host's clock alone")
    _need_model(ground, backend)
    options = _options(backend, ground)
    target = find_target(options.slim)
    place = str(ground.device)
    bench = Bench(Source(str(target.folder(backend)), backend, place, place, 1, "auto", gpu=gpu_name(ground.device)))
    bench.load()
    bench.place(InputMaker(target.collator(False), options).make(grid(options)[0]).arrays)
    bench.turn(TOKENS, 3)
    torch.cuda.synchronize(ground.device)
    started = time.perf_counter()
    events = sum(run["end_to_end"] for run in bench.turn(TOKENS, REPEATS))
    torch.cuda.synchronize(ground.device)
    host = time.perf_counter() - started
    low, high = CLOCKS_AGREE
    said = f"{REPEATS} answers took {1000 * events:.1f} ms by the device's events, {1000 * host:.1f} ms by the host"
    if not low <= events / host <= high:
        raise WrongError(f"{said}; accepted is {low:.0%} to {high:.0%} of it")
    return said


def _need_model(ground: Ground, backend: str) -> None:
    ground.need("recovery" if backend == TORCH else "export")
    if ground.gpu and backend == ONNX and "onnxruntime-gpu" not in installed_runtimes():
        raise SkippedError("the ONNX Runtime that is installed runs on CPUs only; 'slimvlm[gpu]' brings the other")


def _options(backend: str, ground: Ground) -> ProfileOptions:
    run: Path = ground.folder / RUN
    return ProfileOptions(
        slim=str(run),
        backend=(backend,),
        device=str(ground.device),
        batch_sizes=(1,),
        new_tokens=(TOKENS,),
        decoder_tests=False,
        starts=1,
        rounds=6,
        cell_seconds=1.0,
        out=run / f"profile-{backend}.json",
    )
