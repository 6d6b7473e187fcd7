"""What the profiler itself costs, and how long the default grid takes.

    python benchmarks/profiling.py overhead [--model FOLDER] [--rounds 60] [--threads 1] [--clock wall|cpu]
    python benchmarks/profiling.py grid SLIM [--against FOLDER] [--threads N]

`overhead` runs the same generation as the profiler's worker does (marks between phases) and as a plain loop between two
readings of the clock, in turn in one process, and states the ratio of the medians with its interval. `--clock cpu`
counts the process's CPU time: use it with one thread on a machine that others are using. What the profiler does on its
own is also timed with a model that takes no time. `grid` is the default grid on torch, onnx and torchscript; exports
that are missing are made first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slimvlm.demo import MODEL
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.serve import backends
from slimvlm.serve.bench import Bench, Source
from slimvlm.serve.options import BACKENDS, ProfileOptions
from slimvlm.serve.profiling import profile_models
from slimvlm.serve.statistics import paired_ratio
from slimvlm.serve.targets import find_target
from slimvlm.serve.workload import InputMaker, Workload

ACCEPTED = 0.01
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@torch.inference_mode()
def plain(backend: Any, new_tokens: int, read: Callable[[], float]) -> float:
    """Seconds of one generation, by nothing but the clock before and after."""
    started = read()
    token = backend.prefill(backend.vision(), new_tokens).argmax(-1, keepdim=True)
    for _ in range(new_tokens - 1):
        token = backend.step(token).argmax(-1, keepdim=True)
    return read() - started


class Instant:
    """A model that answers at once."""

    def __init__(self) -> None:
        self.logits = torch.zeros(1, 8)

    def vision(self) -> None:
        """Nothing."""

    def prefill(self, features: None, new_tokens: int) -> torch.Tensor:
        """The same as ever."""
        return self.logits

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """The same as ever."""
        return self.logits


def own_seconds(new_tokens: int, repeats: int = 300) -> float:
    """Least time the profiler's loop takes beyond the plain one's least."""
    model, clock = Instant(), backends.HostClock()
    timed, bare = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        backends.time_generation(model, clock, new_tokens)
        timed.append(time.perf_counter() - started)
        bare.append(plain(model, new_tokens, time.perf_counter))
    return min(timed) - min(bare)


def overhead(arguments: argparse.Namespace) -> None:
    """The profiler's median over the plain loop's."""
    bench = Bench(Source(arguments.model, "torch", "cpu", "cpu", arguments.threads, "auto"))
    bench.load()
    backends.HostClock.mark = staticmethod(CLOCKS[arguments.clock])
    options = ProfileOptions(slim=arguments.model)
    maker = InputMaker(find_target(arguments.model).collator(False), options)
    bench.place(maker.make(Workload(1, None, None, arguments.new_tokens)).arrays)
    timed: list[float] = []
    bare: list[float] = []
    for index in range(arguments.rounds + 2):
        for way in ("timed", "bare") if index % 2 else ("bare", "timed"):
            if way == "bare":
                bare.append(plain(bench.backend, arguments.new_tokens, CLOCKS[arguments.clock]))
            else:
                [run] = bench.turn(arguments.new_tokens, 1)
                timed.append(run["end_to_end"])
    ratio = paired_ratio([timed[2:]], [bare[2:]])
    print(f"plain loop {1000 * ratio.slim:.3f} ms, profiler {1000 * ratio.dense:.3f} ms, {arguments.rounds} rounds")
    print(f"profiler / plain {ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f}), accepted {1 + ACCEPTED}")
    own = own_seconds(arguments.new_tokens)
    print(f"the profiler's own work {1e6 * own:.0f} us, {own / ratio.slim:.3%} of the plain loop")


def grid(arguments: argparse.Namespace) -> None:
    """Seconds of the default grid."""

    def exporter(checkpoint: str, out: Path, backends: tuple[str, ...]) -> Path:
        export_checkpoint(checkpoint, out, ExportOptions(formats=backends, samples=2, max_new_tokens=4))
        return out

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        print(f"{time.perf_counter() - started:7.1f} s  {stage} {done}/{total} {note}", flush=True)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = ProfileOptions(
            slim=arguments.slim,
            against=arguments.against,
            backend=BACKENDS,
            device="cpu",
            threads=arguments.threads,
            out=Path(folder) / "profile.json",
        )
        profile_models(options, report, exporter)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("overhead")
    first.add_argument("--model", default=str(MODEL))
    first.add_argument("--rounds", type=int, default=60)
    first.add_argument("--threads", type=int, default=1)
    first.add_argument("--new-tokens", type=int, default=32)
    first.add_argument("--clock", choices=CLOCKS, default="wall")
    first.set_defaults(run=overhead)
    second = commands.add_parser("grid")
    second.add_argument("slim")
    second.add_argument("--against", default=str(MODEL))
    second.add_argument("--threads", type=int, default=None)
    second.set_defaults(run=grid)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
