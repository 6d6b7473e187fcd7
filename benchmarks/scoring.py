"""How fast the CPU paths of the kernels are against the plain torch they replace, side by side in one process.

    python benchmarks/scoring.py [--repeats 7] [--threads 1] [--clock wall|cpu] [--output FILE]

All of a comparison run in turn, round after round; ratios are taken of minima and of medians. `--clock cpu` counts the
process's CPU time: use it with one thread on a machine that others are using. `calibration` and `cut` run the library
with its kernels and with plain torch in their places, on a random LLaVA of hidden size 1024 and 4 + 4 layers.
A GPU is measured by `slimvlm kernels`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from calibration import make_batches, make_model
from torch import Tensor

from slimvlm import kernels
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.slicing import apply as slicing
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.collectors import angles, gradients
from slimvlm.kernels.histogram import reference

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Runs = Mapping[str, Callable[[], object]]
# (comparison, faster or cheaper, than, at least so many times)
TARGETS = (
    ("taylor_sums rows", "kernel", "eager", 3.0),
    ("taylor_sums rows", "kernel", "torch.sum of both", 0.6),
    ("taylor_sums columns", "kernel", "eager", 3.0),
    ("taylor_sums columns", "kernel", "torch.sum of both", 0.6),
    ("angle_histogram", "kernel", "torch.histc loop", 8.0),
    ("angle_histogram", "kernel", "matmul", 1 / 0.35),
    ("gather_2d", "kernel", "two index_selects", 1.5),
    ("gather_2d", "kernel", "clone of the result", 0.45),
    ("calibration", "kernels", "plain torch", 1.0),
    ("cut", "kernels", "plain torch", 0.9),  # one-sided cuts: nothing to gain, nothing may be lost
)


def taylor(dim: int) -> Runs:
    weight, grad = torch.randn(4096, 4096), torch.randn(4096, 4096)
    return {
        "kernel": lambda: kernels.taylor_sums(weight, grad, dim),
        "eager": lambda: (weight * grad).abs().sum(1 - dim),
        "torch.sum of both": lambda: (weight.sum(), grad.sum()),
    }


def histogram() -> Runs:
    tokens, weight = torch.randn(2048, 1024), torch.randn(2048, 1024)
    lengths, widths = tokens.norm(dim=1), weight.norm(dim=1)
    counts = torch.zeros(2048, 100, dtype=torch.int64)
    outputs = tokens @ weight.t()
    return {
        "kernel": lambda: kernels.angle_histogram(outputs, lengths, widths, None, counts),
        "torch.histc loop": lambda: histc_loop(outputs, lengths, widths, None, counts),
        "matmul": lambda: tokens @ weight.t(),
    }


def histc_loop(
    outputs: Tensor, lengths: Tensor, widths: Tensor, bias: Tensor | None, counts: Tensor, **options: Any
) -> None:
    """The paper's way: cosines of one channel, then its histogram."""
    if (mask := options.get("mask")) is not None:
        outputs, lengths = outputs[mask], lengths[mask]
    for row in range(counts.shape[0]):
        product = outputs[:, row] if bias is None else outputs[:, row] - bias[row]
        counts[row] += torch.histc((product / (lengths * widths[row])).clamp_(-1, 1), counts.shape[1], -1, 1).long()


def gather() -> Runs:
    weight = torch.randn(8192, 8192)
    rows, cols = (torch.randperm(8192)[:4096].sort().values for _ in range(2))
    kept = weight[rows][:, cols]
    return {
        "kernel": lambda: kernels.gather_2d(weight, rows, cols),
        "two index_selects": lambda: weight.index_select(0, rows).index_select(1, cols),
        "clone of the result": kept.clone,
    }


def calibration() -> Runs:
    model = make_model(1024, 4, "cpu")
    family = find_family(model.config)
    groups, batches = find_groups(model, family), make_batches(4, 2)
    options = CRITERIA["ukmi"].calibration()

    def run(replaced: AbstractContextManager[object]) -> object:
        with replaced:
            return collect(model, family, groups, batches, options)

    return {"kernels": lambda: run(nullcontext()), "plain torch": lambda: run(plain_statistics())}


@contextmanager
def plain_statistics() -> Iterator[None]:
    """Eager sums and a loop of torch.histc in the places of the kernels."""

    def sums(weights: Sequence[Tensor], grads: Sequence[Tensor], dims: Sequence[int], **_: object) -> list[Tensor]:
        return [(weight * grad).abs().sum(1 - dim) for weight, grad, dim in zip(weights, grads, dims, strict=True)]

    with (
        mock.patch.object(gradients, "taylor_sums_batch", sums),
        mock.patch.object(angles, "angle_histogram", histc_loop),
    ):
        yield


def cut() -> Runs:
    """Every matrix of a 7B language layer at half of its heads and channels."""
    shapes = {"q": (4096, 4096), "gate": (11008, 4096), "down": (4096, 11008)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    half = {size: torch.randperm(size)[: size // 2].sort().values for size in (4096, 11008)}
    asked = {"q": (half[4096], None), "gate": (half[11008], None), "down": (None, half[11008])}

    def run(take: Callable[..., Tensor]) -> None:
        for name, weight in weights.items():
            take(weight, *asked[name])

    def plain(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
        for dim, kept in enumerate((rows, cols)):
            weight = weight if kept is None else weight.index_select(dim, kept)
        return weight

    return {"kernels": lambda: run(slicing._take), "plain torch": lambda: run(plain)}


COMPARISONS: dict[str, Callable[[], Runs]] = {
    "taylor_sums rows": lambda: taylor(0),
    "taylor_sums columns": lambda: taylor(1),
    "angle_histogram": histogram,
    "gather_2d": gather,
    "cut": cut,
    "calibration": calibration,
}


def measure(runs: Runs, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Milliseconds of every round but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, call in runs.items():
            start = clock()
            call()
            seconds[name].append(1000 * (clock() - start))
    return {name: values[1:] for name, values in seconds.items()}


def histogram_memory(tokens: int) -> float | None:
    """MB that one call takes beyond its operands: growth of the peak resident memory; None where Linux does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def peak() -> float:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024

    outputs = torch.randn(tokens, 2048)
    counts = torch.zeros(2048, 100, dtype=torch.int64)
    norms = torch.ones(tokens), torch.ones(2048)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = peak()
    kernels.angle_histogram(outputs, *norms, None, counts)
    return peak() - before


def check_agreement() -> None:
    """What is compared computes the same."""
    runs = taylor(0)
    torch.testing.assert_close(runs["kernel"](), runs["eager"](), rtol=1e-4, atol=1e-4)
    outputs, lengths, widths = torch.randn(64, 9) / 3, torch.ones(64), torch.ones(9)
    counts = [torch.zeros(9, 100, dtype=torch.int64) for _ in range(2)]
    kernels.angle_histogram(outputs, lengths, widths, None, counts[0])
    reference.angle_histogram(outputs, (lengths, widths), None, counts[1], None, False)
    assert (counts[0] - counts[1]).abs().sum() <= 4, "more than rounding beside an edge"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--only", choices=tuple(COMPARISONS), nargs="*", default=tuple(COMPARISONS))
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    check_agreement()
    result: dict[str, object] = {
        "setting": {
            "torch": torch.__version__, "machine": platform.machine(), "threads": asked.threads,
            "clock": asked.clock, "repeats": asked.repeats, "load_before": os.getloadavg()[0],
        },
        "histogram_memory_mb": {tokens: histogram_memory(tokens) for tokens in (2048, 16384)},
    }  # fmt: skip
    print(f"angle_histogram: extra memory {result['histogram_memory_mb']} MB by tokens (target <= 16)")
    for name in asked.only:
        times = measure(COMPARISONS[name](), asked.repeats, CLOCKS[asked.clock])
        result[name] = {run: {"min_ms": min(ms), "median_ms": statistics.median(ms)} for run, ms in times.items()}
        for run, ms in times.items():
            print(f"{name:20} {run:20} min {min(ms):9.2f} ms  median {statistics.median(ms):9.2f} ms")
        for comparison, ours, other, target in TARGETS:
            if comparison == name:
                least = min(times[other]) / min(times[ours])
                middle = statistics.median(times[other]) / statistics.median(times[ours])
                verdict = "ok" if max(least, middle) >= target else "MISSED"
                print(
                    f"{'':20} {least:.2f} x (median {middle:.2f} x) against {other}; target {target:.2f} x: {verdict}"
                )
    if asked.output:
        asked.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["setting"]))


if __name__ == "__main__":
    main()
