"""The figures of a profile in tables: a row a workload or a phase, every column a field of profile.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

from slimvlm.compress.runs import PROFILE
from slimvlm.serve.profile import PHASES, Cell, DecoderTest, Device, Memory, Profile, Ratio, Run, Subject
from slimvlm.serve.report.document import Table, change, figure, percent, shown, whole

MIB = 2**20
MEMORY_NAMES = {
    "host_loaded_bytes": "host, loaded",
    "host_mapped_bytes": "host, mapped files",
    "host_peak_bytes": "host, peak",
    "device_peak_bytes": "device, peak",
    "device_reserved_bytes": "device, reserved",
    "device_driver_bytes": "device, by the driver",
}


class Numbered(NamedTuple):
    """A cell and its number in the tables and charts; it is profile.json's cells[number - 1]."""

    number: int
    cell: Cell


def tables(profile: Profile, cells: Sequence[Numbered]) -> Iterator[Table]:
    """All that have a row, what users look for first."""
    device = shown(profile.device.name)
    found = (
        *(_models(profile.models), _workloads(cells), _latency(cells, device), _decoder_tests(profile, device)),
        *(_verdicts(profile, device), _device_use(cells, device), _memory(cells, device), _limits(profile)),
        *(_origins(profile.models), _device(profile.device), _settings(profile)),
    )
    return (table for table in found if table.rows)


def device_words(device: Device) -> str:
    """Name, threads and driver."""
    driver = f", driver {shown(device.driver)}" if device.driver else ""
    threads = "1 thread" if device.threads == 1 else f"{device.threads} threads"
    return f"{shown(device.name)} ({shown(device.kind)}), {threads}{driver}"


def interval(ratio: Ratio) -> str:
    """`1.90 to 2.10`."""
    return f"{ratio.low:.2f} to {ratio.high:.2f}"


def number(value: float | None, times: float = 1) -> str:
    """So many times the value to three digits, large ones to the whole."""
    scaled = None if value is None else times * value
    return whole(scaled) if scaled is not None and abs(scaled) >= 1000 else figure(scaled)


def _models(models: Mapping[str, Subject]) -> Table:
    names = [name for name in ("dense", "slim") if name in models]
    rows = [
        _compared("parameters", [models[name].parameters for name in names]),
        _compared("weights as stored, bytes", [models[name].weight_bytes for name in names]),
        _compared("keys and values per token, bytes", [models[name].kv_bytes_per_token for name in names]),
    ]
    columns = ("", *names, *(["change"] if len(names) > 1 else []))
    return Table("Sizes of the measured models", columns, rows, f"{PROFILE}: models")


def _origins(models: Mapping[str, Subject]) -> Table:
    rows = [
        (name, shown(one.source), shown(one.family), shown(one.layout), shown(one.digest))
        for name, one in models.items()
    ]
    columns = ("model", "folder", "family", "layout", "digest of the weights")
    return Table("The measured models", columns, rows, f"{PROFILE}: models", texts=5)


def _compared(name: str, values: Sequence[int | None]) -> tuple[str, ...]:
    known = [value for value in values if value is not None]
    moved = [change(*known) if len(known) == 2 else "none"] if len(values) == 2 else []
    return name, *(_count(value) for value in values), *moved


def _workloads(cells: Sequence[Numbered]) -> Table:
    rows = [
        (
            *(str(place), shown(cell.backend), shown(cell.dtype), _status(cell), whole(cell.batch_size), _image(cell)),
            *(whole(cell.prompt_tokens), whole(cell.new_tokens), whole(cell.starts), _rounds(cell)),
        )
        for place, cell in cells
    ]
    columns = (
        *("workload", "backend", "dtype", "status", "batch", "image", "prompt tokens", "new tokens"),
        *("starts", "rounds of each"),
    )
    return Table("Workloads", columns, rows, f"{PROFILE}: cells", texts=4)


def _status(cell: Cell) -> str:
    return shown(f"{cell.status}: {cell.reason}" if cell.reason else cell.status)


def _rounds(cell: Cell) -> str:
    """`4`, or `2 to 4`, of every start."""
    counts = {len(rounds) for run in cell.runs.values() for starts in run.seconds.values() for rounds in starts}
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "none"


def _image(cell: Cell) -> str:
    if cell.image_size is None:
        return "processor's own" if any("vision" in run.seconds for run in cell.runs.values()) else "none"
    return f"{cell.image_size[0]} x {cell.image_size[1]}"


def _latency(cells: Sequence[Numbered], device: str) -> Table:
    rows = []
    for place, cell in cells:
        runs = cell.runs
        for phase in (name for name in PHASES if any(name in run.medians for run in runs.values())):
            ratio = cell.ratios.get(phase)
            rows.append(
                (
                    *(str(place), shown(cell.backend), PHASES[phase]),
                    *(number(_of(runs, model, "medians", phase), 1000) for model in ("dense", "slim")),
                    *(("", "", "") if ratio is None else (f"{ratio.value:.2f}", interval(ratio), ratio.verdict)),
                    *(number(_of(runs, model, "tokens_per_second", phase)) for model in ("dense", "slim")),
                )
            )
    columns = (
        *("workload", "backend", "phase", "dense, ms", "slim, ms", "speed-up", "interval", "verdict"),
        *("dense, tokens/s", "slim, tokens/s"),
    )
    source = f"{PROFILE}: cells[].runs.*.medians, .tokens_per_second; cells[].ratios (samples: runs.*.seconds)"
    return Table(f"Times on {device}", columns, rows, source, texts=3)


def _of(runs: Mapping[str, Run], model: str, field: str, phase: str) -> float | None:
    return (getattr(runs[model], field) or {}).get(phase) if model in runs else None


def _decoder_tests(profile: Profile, device: str) -> Table:
    rows = [row for test in profile.decoder_tests for row in _decoder_rows(test, profile)]
    columns = ("model", "backend", "test", "size, MiB", "parameters", "threads", "tokens/s", "speed-up")
    title = f"The language model alone, as llama-bench names its tests, on {device}"
    return Table(title, columns, rows, f"{PROFILE}: decoder_tests, models, device.threads", texts=3)


def _decoder_rows(test: DecoderTest, profile: Profile) -> Iterator[tuple[str, ...]]:
    backend = shown(f"{test.backend} {test.dtype}")
    for model, run in test.runs.items():
        subject, ratio = profile.models.get(model), test.ratio if model == "slim" else None
        yield (
            *(model, backend, shown(test.name)),
            *((number(subject.weight_bytes, 1 / MIB), _count(subject.parameters)) if subject else ("none", "none")),
            *(str(profile.device.threads), f"{run.mean:.2f} ± {run.std:.2f}"),
            f"{ratio.value:.2f} ({interval(ratio)}, {ratio.verdict})" if ratio else "",
        )
    if not test.runs:
        status = shown(f"{test.status}: {test.reason}" if test.reason else test.status)
        yield "none", backend, shown(test.name), "", "", "", status, ""


def _verdicts(profile: Profile, device: str) -> Table:
    rows = [
        (
            *(shown(one.backend), PHASES.get(one.phase, shown(one.phase)), shown(one.workload)),
            *(f"{one.bound}-bound", " ".join(map(shown, one.because))),
            *(f"{one.ideal:.2f}", f"{one.measured:.2f}", "none" if one.reached is None else percent(one.reached)),
        )
        for one in profile.verdicts
    ]
    columns = ("backend", "phase", "workload", "bound", "because", "ideal", "measured", "gain reached")
    return Table(f"What holds the slim model back on {device}", columns, rows, f"{PROFILE}: verdicts", texts=5)


def _device_use(cells: Sequence[Numbered], device: str) -> Table:
    rows = [
        (
            *(str(place), shown(cell.backend), PHASES[phase], model),
            *(number(run.flops[phase] / 1e9), number(run.bytes.get(phase, 0.0) / MIB)),
            *(_share(run.mfu, phase), _share(run.mbu, phase)),
        )
        for place, cell in cells
        for model, run in cell.runs.items()
        for phase in PHASES
        if phase in run.flops
    ]
    columns = ("workload", "backend", "phase", "model", "GFLOP", "MiB moved", "MFU", "MBU")
    title = f"Work, and shares of the matmul rate (MFU) and copy bandwidth (MBU) of {device}"
    return Table(title, columns, rows, f"{PROFILE}: cells[].runs.*.flops, .bytes, .mfu, .mbu", texts=4)


def _share(shares: Mapping[str, float] | None, phase: str) -> str:
    return "none" if shares is None or phase not in shares else f"{figure(100 * shares[phase])} %"


def _memory(cells: Sequence[Numbered], device: str) -> Table:
    used = [
        field.name
        for field in fields(Memory)
        if any(getattr(run.memory, field.name) is not None for _, cell in cells for run in cell.runs.values())
    ]
    rows = [
        (
            *(str(place), shown(cell.backend), model),
            *(number(getattr(run.memory, name), 1 / MIB) for name in used),
            figure(sorted(run.load_seconds)[len(run.load_seconds) // 2] if run.load_seconds else None),
            figure(run.energy_joules_per_token),
        )
        for place, cell in cells
        for model, run in cell.runs.items()
    ]
    names = (f"{MEMORY_NAMES[name]}, MiB" for name in used)
    columns = ("workload", "backend", "model", *names, "load time, s", "energy, J/token")
    source = f"{PROFILE}: cells[].runs.*.memory, .load_seconds (median), .energy_joules_per_token"
    return Table(f"Memory, load time and energy on {device}", columns, rows, source, texts=3)


def _count(number: int | None) -> str:
    return "none" if number is None else whole(number)


def _limits(profile: Profile) -> Table:
    rows = [
        (
            *(shown(one.name), "crossed" if one.crossed else "holds", shown(one.cell)),
            *(number(one.limit), number(one.worst)),
        )
        for one in profile.limits
    ]
    columns = ("limit", "", "worst workload", "accepted", "worst")
    return Table("Limits", columns, rows, f"{PROFILE}: limits", texts=3)


def _device(device: Device) -> Table:
    rows = [
        ("name", shown(device.name)),
        ("kind", shown(device.kind)),
        ("threads used", str(device.threads)),
        ("cores, physical / logical", f"{device.physical_cores or '?'} / {device.logical_cores or '?'}"),
        ("memory, MiB", whole(device.memory_bytes / MIB)),
        *((f"clock, {shown(name)}, MHz", whole(value)) for name, value in device.clock_mhz.items()),
        *((f"cache {shown(name)}, KiB", whole(value / 1024)) for name, value in device.cache_bytes.items()),
        ("instruction sets", shown(" ".join(device.isa))),
        ("driver", shown(device.driver) if device.driver else "none"),
        *(
            (f"measured copy of {figure(int(size) / MIB)} MiB, GB/s", figure(rate / 1e9))
            for size, rate in device.copy_bytes_per_second.items()
        ),
        *(
            (f"measured matmul, {shown(name)}, GFLOP/s", figure(rate / 1e9))
            for name, rate in device.matmul_flops_per_second.items()
        ),
        ("smallest operation, microseconds", figure(1e6 * device.launch_seconds)),
    ]
    return Table("The device", ("", "value"), rows, f"{PROFILE}: device", texts=2)


def _settings(profile: Profile) -> Table:
    values = {**{f"version of {name}": value for name, value in profile.versions.items()}, "seed": profile.seed}
    values |= profile.settings
    rows = [
        (shown(name), shown(value if isinstance(value, str) else json.dumps(value))) for name, value in values.items()
    ]
    source = f"{PROFILE}: versions, seed, settings"
    return Table("How it was measured", ("", "value"), rows, source, texts=2)
