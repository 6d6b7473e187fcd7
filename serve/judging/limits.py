"""The limits a profile is held against, so that it can stand guard in CI. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slimvlm.serve.options import ProfileOptions
from slimvlm.serve.profile import Cell, Limit, Memory, Profile, Run


def check_limits(options: ProfileOptions, profile: Profile) -> tuple[Limit, ...]:
    """One entry per limit that was asked for, with the worst cell of the slim model."""
    read: dict[str, Callable[[Run], float | None]] = {
        "max_ttft_ms": lambda run: _milliseconds(run, "ttft"),
        "max_tpot_ms": lambda run: _milliseconds(run, "tpot"),
        "max_memory": lambda run: peak_memory(run.memory, profile.device.kind),
    }
    asked = {name: getattr(options, name) for name in read}
    return tuple(_worst(name, limit, profile.cells, read[name]) for name, limit in asked.items() if limit is not None)


def peak_memory(memory: Memory, kind: str) -> int | None:
    """Bytes at the peak, where the model runs: on a GPU what its driver shows of the process, whatever allocator took
    it; on a CPU what was resident. None where it cannot be read.

    Args:
        kind: of the device, `cpu` or `cuda`.
    """
    return memory.host_peak_bytes if kind == "cpu" else memory.device_driver_bytes


def limit_words(limit: Limit) -> str:
    """A crossed limit as a sentence without its end."""
    flag = f"--{limit.name.replace('_', '-')}"
    if limit.worst is None:
        return f"{flag} {limit.limit:g}: no cell was measured that it could be held against"
    unit = "bytes" if limit.name == "max_memory" else "ms"
    return f"{flag} {limit.limit:g}: the slim model takes {limit.worst:.4g} {unit} ({limit.cell})"


def _milliseconds(run: Run, phase: str) -> float | None:
    return 1000 * run.medians[phase] if phase in run.medians else None


def _worst(name: str, limit: float, cells: Sequence[Cell], read: Callable[[Run], float | None]) -> Limit:
    measured = [cell for cell in cells if "slim" in cell.runs]
    found = [(value, cell) for cell in measured if (value := read(cell.runs["slim"])) is not None]
    if not found:
        return Limit(name, limit, None, "", True)
    value, cell = max(found, key=lambda one: one[0])
    return Limit(name, limit, value, f"{cell.backend}, {cell.workload}", value > limit)
