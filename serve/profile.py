"""The Profile: what two models cost to run, with every raw sample. Seconds, bytes, joules, tokens. JSON; no torch.

A *cell* is one workload on one backend. A *run* is what one model did in it: its process is started several times, and
every start gives a sample per phase and round; starts and rounds of the dense and the slim model are paired. Everything
else in a profile is derived from these samples and the shapes.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

SCHEMA = 2
LARGEST = 1e18  # of a time, a rate or a ratio
MODELS = ("dense", "slim")
PHASES = {  # and what they are called in words
    "vision": "vision",  # pixels to features of the language model
    "text": "text",  # a dual encoder's text to its embedding
    "prefill": "prefill",  # embeddings of the prompt to the first logits
    "ttft": "first token",  # from pixels and prompt
    "tpot": "per token",  # one later token, mean
    "end_to_end": "end to end",  # pixels and prompt to the last token
}
MEASURED, OUT_OF_MEMORY, FAILED = STATUSES = ("measured", "out of memory", "failed")
FASTER, SLOWER, SAME, TOO_NOISY = RELATIONS = ("faster", "slower", "same", "too noisy")
BOUNDS = ("memory", "compute", "overhead")


def _one_of(what: str, value: str, accepted: typing.Iterable[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{what} is {value!r}; accepted is one of {', '.join(accepted)}")


def _positive(what: str, values: typing.Iterable[float]) -> None:
    for value in values:
        if not 0 < value <= LARGEST:
            raise ValueError(f"{what} is {value!r}; accepted is more than 0 and at most {LARGEST:g}")


def _slim_first(what: str, runs: typing.Collection[str]) -> None:
    """Whatever was measured, the slim model was."""
    for name in runs:
        _one_of(f"{what}: model", name, MODELS)
    if runs and "slim" not in runs:
        raise ValueError(f"{what}: the dense model alone was measured; accepted are slim, or both")


@dataclass(frozen=True, slots=True)
class Device:
    """What was measured on, and how fast it was found to copy and to multiply.

    Attributes:
        kind: `cpu` or `cuda`.
        threads: that the measurements used.
        clock_mhz: what the system says of the clock: `current`, `max` and the like.
        isa: instruction sets (CPU) or compute capability (CUDA) that decide which kernels run.
        driver: of a GPU; None for a CPU.
        copy_bytes_per_second: bytes touched (a buffer and its copy) -> bytes read and written per second; what is small
            stays in a cache, the largest does not.
        matmul_flops_per_second: dtype -> floating-point operations per second of a large matrix product.
        launch_seconds: time of an operation that has nothing to do.
    """

    kind: str
    name: str
    threads: int
    physical_cores: int | None
    logical_cores: int | None
    memory_bytes: int
    clock_mhz: Mapping[str, float]
    cache_bytes: Mapping[str, int]
    isa: tuple[str, ...]
    driver: str | None
    copy_bytes_per_second: Mapping[str, float]
    matmul_flops_per_second: Mapping[str, float]
    launch_seconds: float

    def __post_init__(self) -> None:
        if wrong := [size for size in self.copy_bytes_per_second if not size.isdecimal()]:
            raise ValueError(f"copy_bytes_per_second has the key {wrong[0]!r}; accepted are numbers of bytes")
        _positive("a rate", (*self.copy_bytes_per_second.values(), *self.matmul_flops_per_second.values()))
        _positive("launch_seconds", (self.launch_seconds,))


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that was measured.

    Attributes:
        source: folder as it was given.
        layout: `dense`, `per-layer` or `stock`.
        kv_bytes_per_token: keys and values that one more token leaves in the cache; 0 for a dual encoder.
        digest: identity of the weights.
        zeros: share of the parameters that `slimvlm sparsify` made zero.
    """

    source: str
    family: str
    layout: str
    parameters: int | None
    weight_bytes: int
    kv_bytes_per_token: int | None
    digest: str
    zeros: float = 0.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process of its own, the most of its starts; None where it cannot be read.

    Attributes:
        host_loaded_bytes: of its own after loading (not shared, not pages of files), less what the imports took.
        host_mapped_bytes: pages of files that were resident then: weights that are mapped, not copied. The system may
            drop them, and other processes share them.
        host_peak_bytes: resident at the peak, mapped pages included, less what the imports took.
        device_peak_bytes, device_reserved_bytes: of torch's allocator.
        device_driver_bytes: what the driver shows of this process at the peak of what it held, contexts included.
    """

    host_loaded_bytes: int | None
    host_mapped_bytes: int | None
    host_peak_bytes: int | None
    device_peak_bytes: int | None = None
    device_reserved_bytes: int | None = None
    device_driver_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What one model did in one cell.

    Attributes:
        seconds: phase -> start of the process -> one sample per round.
        load_seconds: from the folder to a model that can be run, one per start of a process.
        medians: phase -> median over the rounds of a start, geometric mean over the starts.
        tokens_per_second: phase -> prompt tokens (prefill) or new tokens (tpot, end_to_end) of the whole batch.
        flops, bytes: phase -> floating-point operations and bytes that must be moved, counted from the shapes.
        mfu, mbu: phase -> share of the device's measured matmul rate and copy bandwidth; None where it is not known.
    """

    seconds: Mapping[str, tuple[tuple[float, ...], ...]]
    load_seconds: tuple[float, ...]
    memory: Memory
    energy_joules_per_token: float | None = None
    medians: Mapping[str, float] = field(default_factory=dict)
    tokens_per_second: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    mfu: Mapping[str, float] | None = None
    mbu: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for phase, starts in self.seconds.items():
            if not all(starts):
                raise ValueError(f"seconds.{phase} has a start without a round")
            _positive(f"seconds.{phase}", chain.from_iterable(starts))
        _positive("a median", self.medians.values())
        if self.medians and (missing := sorted(set(self.seconds) - set(self.medians))):
            raise ValueError(f"medians has no {missing[0]}, of which there are seconds")


@dataclass(frozen=True, slots=True)
class Ratio:
    """dense / slim of one phase: `value` > 1 is a speed-up; `low` to `high` is its 95 % interval."""

    slim: float
    dense: float
    value: float
    low: float
    high: float
    verdict: str

    def __post_init__(self) -> None:
        _one_of("ratio: verdict", self.verdict, RELATIONS)
        _positive("ratio", (self.slim, self.dense, self.value, self.low, self.high))
        if not self.low <= self.value <= self.high:
            raise ValueError(f"ratio: {self.value!r} lies outside of its interval, {self.low!r} to {self.high!r}")


@dataclass(frozen=True, slots=True)
class Cell:
    """One workload on one backend.

    Attributes:
        backend: `torch`, `onnx`, `torchscript`, with a variant behind a colon (`onnx:int8`).
        image_size: height and width; None for the processor's own or a text-only workload.
        reason: why it was not measured; empty if it was.
        runs: `dense` and `slim`, or `slim` alone.
        ratios: phase -> dense / slim; empty without a dense model.
    """

    backend: str
    dtype: str
    batch_size: int
    image_size: tuple[int, int] | None
    prompt_tokens: int
    new_tokens: int
    status: str
    reason: str = ""
    runs: Mapping[str, Run] = field(default_factory=dict)
    ratios: Mapping[str, Ratio] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("cell: status", self.status, STATUSES)
        _slim_first("cell", self.runs)
        for phase in {*self.ratios, *(phase for run in self.runs.values() for phase in run.seconds)}:
            _one_of("cell: phase", phase, PHASES)
        if "dense" in self.runs and (
            missing := sorted(set(self.runs["slim"].medians) - set(self.runs["dense"].medians))
        ):
            raise ValueError(f"cell: the dense model has no median of {missing[0]}, the slim one has")

    @property
    def starts(self) -> int:
        """How often the processes were started."""
        return max((len(run.load_seconds) for run in self.runs.values()), default=0)

    @property
    def workload(self) -> str:
        """In words: `batch 1, image 224 x 224, prompt 32, new 16`."""
        image = f", image {self.image_size[0]} x {self.image_size[1]}" if self.image_size else ""
        return f"batch {self.batch_size}{image}, prompt {self.prompt_tokens}, new {self.new_tokens}"


@dataclass(frozen=True, slots=True)
class DecoderRun:
    """Repetitions of a decoder test: tokens per second of each, by start of the process; mean and standard deviation
    (n - 1) of all.
    """

    tokens_per_second: tuple[tuple[float, ...], ...]
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class DecoderTest:
    """The language model alone, as llama-bench names it: `pp512` reads 512 tokens, `tg128` writes 128."""

    backend: str
    dtype: str
    name: str
    tokens: int
    status: str
    reason: str = ""
    runs: Mapping[str, DecoderRun] = field(default_factory=dict)
    ratio: Ratio | None = None

    def __post_init__(self) -> None:
        _one_of("decoder test: status", self.status, STATUSES)
        _slim_first("decoder test", self.runs)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What holds the slim model back in one phase, and how much of what the cut could give it did give.

    Attributes:
        bound: `memory`, `compute` or `overhead`.
        ideal: speed-up (dense / slim) if time followed the work that limits it.
        measured: speed-up that was measured.
        reached: share of the ideal gain, (measured - 1) / (ideal - 1); None where the cut left no work out
            or the ratio is too noisy.
        because: sentences.
    """

    backend: str
    phase: str
    workload: str
    bound: str
    ideal: float
    measured: float
    reached: float | None
    because: tuple[str, ...]

    def __post_init__(self) -> None:
        _one_of("verdict: bound", self.bound, BOUNDS)


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit that was asked for (`max_ttft_ms`, `max_tpot_ms`, `max_memory`), and the worst cell of the slim model;
    `worst` is None if nothing could be measured against it, which counts as crossed.
    """

    name: str
    limit: float
    worst: float | None
    cell: str
    crossed: bool


@dataclass(frozen=True, slots=True)
class Profile:
    """A measurement: `models` by the names of MODELS, `skipped` says which backends were left out and why."""

    command: tuple[str, ...]
    versions: Mapping[str, str]
    seed: int
    device: Device
    settings: Mapping[str, Any]  # JSON, of this version of the profiler
    models: Mapping[str, Subject]
    cells: tuple[Cell, ...] = ()
    decoder_tests: tuple[DecoderTest, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    limits: tuple[Limit, ...] = ()
    skipped: tuple[str, ...] = ()
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Indented JSON.

        Raises:
            ValueError: a figure is not finite.
        """
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
