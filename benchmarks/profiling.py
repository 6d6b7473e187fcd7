"""What the profiler itself costs, and how long the default grid takes.

    python benchmarks/profiling.py overhead [--model FOLDER] [--rounds 60] [--threads 1] [--clock wall|cpu]
    python benchmarks/profiling.py onnx SLIM_EXPORT [--against DENSE_EXPORT] [--rounds 60] [--threads 1] [--clock ...]
    python benchmarks/profiling.py grid SLIM [--against FOLDER] [--threads N]

`overhead` runs the same generation as the profiler's worker does (marks between phases) and as a plain loop between two
readings of the clock, in turn in one process, and states the ratio of the medians with its interval. `--clock cpu`
counts the process's CPU time: use it with one thread on a machine that others are using. What the profiler does on its
own is also timed with a model that takes no time. `onnx` runs the profiler's worker and the loop of an exported
`run_onnx.py` (arrays from session to session, nothing else), in turn, and states per token what the profiler adds, and
the ratio of both models by both. `grid` is the default grid on torch, onnx and torchscript; exports
that are missing are made first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimvlm.demo import MODEL
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.generation import Arrays, empty_cache, prompt_positions
from slimvlm.export.running.runners import SessionRunner
from slimvlm.serve.backends import backend as backends
from slimvlm.serve.judging.intervals import paired_ratio
from slimvlm.serve.measuring.bench import Bench, Source
from slimvlm.serve.measuring.workload import InputMaker, Workload
from slimvlm.serve.options import BACKENDS, ProfileOptions
from slimvlm.serve.profiling import profile_models
from slimvlm.serve.targets import find_target

ACCEPTED = 0.01
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@torch.inference_mode()
def plain(backend: Any, new_tokens: int, read: Callable[[], float]) -> float:
    """Seconds of one generation, by nothing but the clock before and after."""
    started = read()
    token = backend.prefill(backend.vision(), new_tokens).argmax(-1, keepdims=True)
    for _ in range(new_tokens - 1):
        token = backend.step(token).argmax(-1, keepdims=True)
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


class Bare:
    """A decoder's graphs in the barest loop that a client can write: seconds of one later token."""

    def __init__(self, folder: str, threads: int, read: Callable[[], float]) -> None:
        export = Exported.open(Path(folder))
        files = {artifact.graph: export.folder / artifact.file for artifact in export.graphs["onnx"]}
        self.runner = SessionRunner(files, threads=threads)
        self.prompting: Any = export.manifest.generation
        self.read = read
        self.embed, self.decoder = (self.runner.session(name) for name in ("embed_tokens", "decoder_model_merged"))
        self.outputs = [port.name for port in self.decoder.get_outputs()]
        self.taken = [port.name for port in self.decoder.get_inputs()]

    def seconds(self, arrays: Arrays, new_tokens: int) -> float:
        """Mean over the tokens after the first."""
        ids = arrays["input_ids"]
        place = prompt_positions(self.prompting, ids, np.ones_like(ids))
        masks = [np.ones((len(ids), ids.shape[1] + step), np.int64) for step in range(new_tokens)]
        places = [place, *(place[..., -1:] + step for step in range(1, new_tokens))]
        feeds = empty_cache(self.runner, len(ids), {})
        past = [name for name in self.outputs if name.startswith("present")]
        names = [(self.outputs.index(name), name.replace("present", "past_key_values")) for name in past]
        marks = []
        for mask, position in zip(masks, places, strict=True):
            feeds["inputs_embeds"] = self.embed.run(None, {"input_ids": ids})[0]
            feeds["attention_mask"] = mask
            feeds["position_ids"] = position
            outputs = self.decoder.run(self.outputs, feeds)
            for index, name in names:
                feeds[name] = outputs[index]
            ids = outputs[0][:, -1].argmax(-1)[:, None]
            marks.append(self.read())
        return (marks[-1] - marks[0]) / (new_tokens - 1)


def lean(arguments: argparse.Namespace) -> None:
    """What the profiler's loop over sessions adds to a client's, per token."""
    read = CLOCKS[arguments.clock]
    backends.HostClock.mark = staticmethod(read)
    folders = {"dense": arguments.against, "slim": arguments.slim}
    folders = {name: folder for name, folder in folders.items() if folder}
    ids = np.random.default_rng(0).integers(5, 100, (1, arguments.prompt_tokens))
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    ways: dict[tuple[str, str], Callable[[], float]] = {}
    for name, folder in folders.items():
        bench = Bench(Source(folder, "onnx", "cpu", "cpu", arguments.threads, "auto"))
        bench.load()
        bench.place(arrays)
        ways["profiler", name] = partial(_timed, bench, arguments.new_tokens)
        ways["bare", name] = partial(Bare(folder, arguments.threads, read).seconds, arrays, arguments.new_tokens)
    found: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for index in range(arguments.rounds + 2):
        for way in list(ways) if index % 2 else reversed(list(ways)):
            found[way].append(ways[way]())
    found = {way: samples[2:] for way, samples in found.items()}
    for way, samples in found.items():
        print(f"{' '.join(way):15s} {1000 * np.median(samples):.3f} ms per token, least {1000 * min(samples):.3f}")
    for name in folders:
        ratio = paired_ratio([found["profiler", name]], [found["bare", name]])
        added = f"{1000 * (ratio.dense - ratio.slim):.3f} ms per token"
        print(f"{name}: the profiler adds {added} ({ratio.value:.3f}, {ratio.low:.3f} to {ratio.high:.3f})")
    for loop in ("profiler", "bare") if len(folders) > 1 else ():
        ratio = paired_ratio([found[loop, "dense"]], [found[loop, "slim"]])
        print(f"dense / slim by {loop}: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")


def _timed(bench: Bench, new_tokens: int) -> float:
    return bench.turn(new_tokens, 1)[0]["tpot"]


def grid(arguments: argparse.Namespace) -> None:
    """Seconds of the default grid."""

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
        profile_models(options, report)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--rounds", type=int, default=60)
    shared.add_argument("--threads", type=int, default=1)
    shared.add_argument("--new-tokens", type=int, default=32)
    shared.add_argument("--clock", choices=CLOCKS, default="wall")
    first = commands.add_parser("overhead", parents=[shared])
    first.add_argument("--model", default=str(MODEL))
    first.set_defaults(run=overhead)
    third = commands.add_parser("onnx", parents=[shared])
    third.add_argument("slim")
    third.add_argument("--against")
    third.add_argument("--prompt-tokens", type=int, default=45)
    third.set_defaults(run=lean)
    second = commands.add_parser("grid")
    second.add_argument("slim")
    second.add_argument("--against", default=str(MODEL))
    second.add_argument("--threads", type=int, default=None)
    second.set_defaults(run=grid)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
