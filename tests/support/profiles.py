"""Profiles with figures that are easy to check: what a measurement would have written."""

from __future__ import annotations

from dataclasses import replace

from slimvlm.serve.profile import (
    Cell,
    DecoderRun,
    DecoderTest,
    Device,
    Limit,
    Memory,
    Profile,
    Ratio,
    Run,
    Subject,
    Verdict,
)

DEVICE = Device(
    kind="cpu",
    name="a processor",
    threads=2,
    physical_cores=2,
    logical_cores=4,
    memory_bytes=2**34,
    clock_mhz={"current": 2000.0},
    cache_bytes={"L3": 2**24},
    isa=("avx2",),
    driver=None,
    copy_bytes_per_second={str(2**20): 5e10, str(2**28): 1e10},
    matmul_flops_per_second={"fp32": 1e11},
    launch_seconds=5e-6,
)


def example_run(seconds: dict[str, float], peak: int) -> Run:
    """Three starts of three rounds around the given medians."""
    samples = {phase: 3 * ((0.9 * value, value, 1.2 * value),) for phase, value in seconds.items()}
    return Run(
        seconds=samples,
        load_seconds=(0.5, 0.5, 0.5),
        memory=Memory(host_loaded_bytes=peak // 2, host_mapped_bytes=peak // 4, host_peak_bytes=peak),
        medians=seconds,
        tokens_per_second={"tpot": 1 / seconds["tpot"]},
        flops={phase: 1e8 for phase in seconds},
        bytes={phase: 1e7 for phase in seconds},
        mfu={phase: 0.25 for phase in seconds},
        mbu={phase: 0.5 for phase in seconds},
    )


def example_cell(backend: str = "torch") -> Cell:
    """Vision got slower, the rest faster."""
    dense = {"vision": 0.010, "prefill": 0.020, "ttft": 0.030, "tpot": 0.004, "end_to_end": 0.090}
    slim = {"vision": 0.012, "prefill": 0.010, "ttft": 0.022, "tpot": 0.002, "end_to_end": 0.052}
    ratios = {}
    for phase, value in slim.items():
        ratio = dense[phase] / value
        ratios[phase] = Ratio(value, dense[phase], ratio, ratio * 0.95, ratio * 1.05, _verdict(ratio))
    return Cell(
        backend=backend,
        dtype="fp32",
        batch_size=1,
        image_size=(32, 32),
        prompt_tokens=16,
        new_tokens=16,
        status="measured",
        runs={"dense": example_run(dense, 2**27), "slim": example_run(slim, 2**26)},
        ratios=ratios,
    )


def _verdict(ratio: float) -> str:
    return "faster" if ratio > 1 else "slower"


def example_profile() -> Profile:
    """One measured cell, one that ran out of memory, one decoder test, one verdict, a limit that holds."""
    cell = example_cell()
    full = Cell("torch", "fp32", 64, (32, 32), 16, 16, "out of memory", "the process was killed")
    test = DecoderTest(
        *("torch", "fp32", "tg128", 128, "measured", ""),
        runs={name: DecoderRun(((rate,), (rate,)), rate, 0.0) for name, rate in (("dense", 250.0), ("slim", 500.0))},
        ratio=Ratio(0.256, 0.512, 2.0, 1.9, 2.1, "faster"),
    )
    return Profile(
        command=("slimvlm", "profile", "slim"),
        versions={"slimvlm": "1.0"},
        seed=0,
        device=DEVICE,
        settings={"threads": 2, "rounds": 3},
        models={
            "dense": Subject("dense", "llava", "dense", 2_000_000, 8_000_000, 1024, "ab" * 32),
            "slim": Subject("slim", "llava", "per-layer", 1_000_000, 4_000_000, 512, "cd" * 32),
        },
        cells=(cell, full),
        decoder_tests=(test,),
        verdicts=(
            Verdict("torch", "tpot", cell.workload, "memory", 2.5, 2.0, 0.667, ("Not cut: output head (31 %).",)),
        ),
        limits=(Limit("max_ttft_ms", 50.0, 22.0, cell.workload, False),),
        skipped=("onnx: onnxruntime is not installed",),
    )


def hostile_profile(text: str) -> Profile:
    """The same, in which every text that a user or a machine decides is or holds `text`."""
    profile = example_profile()
    return replace(
        profile,
        command=("slimvlm", text),
        versions={text: text},
        device=replace(profile.device, name=text, isa=(text,), driver=text, clock_mhz={text: 1.0}),
        settings={text: text},
        models={name: replace(one, source=text, digest=text) for name, one in profile.models.items()},
        cells=tuple(replace(cell, backend=text, reason=cell.reason and text) for cell in profile.cells),
        decoder_tests=tuple(replace(test, backend=text, name=text) for test in profile.decoder_tests),
        verdicts=tuple(replace(one, backend=text, workload=text, because=(text,)) for one in profile.verdicts),
        limits=tuple(replace(limit, name=text, cell=text) for limit in profile.limits),
        skipped=(text,),
    )
