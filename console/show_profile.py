"""The result of `slimvlm profile` on stdout."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from slimvlm.console.printing import print_json, print_line, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from slimvlm.serve.profile import Cell, DecoderTest, Limit, Profile, Ratio, Verdict

MEBIBYTE = 2**20


def show_profile(profile: Profile, written: Path, *, as_json: bool) -> None:
    """Times of both models per cell and phase with the interval of their ratio, memory, and what holds the slim one."""
    if as_json:
        print_json(asdict(profile))
        return
    device = profile.device
    print_line(f"device   {device.name} ({device.kind}), {device.threads} threads")
    for cell in profile.cells:
        _show_cell(cell, device.kind)
    if profile.decoder_tests:
        print_line()
        print_table(
            ("tokens/s", "dense", "slim", "dense / slim", ""), [_decoder_row(one) for one in profile.decoder_tests]
        )
    print_line()
    for backend in dict.fromkeys(one.backend for one in profile.verdicts):
        print_line(f"{backend}: {_bounds([one for one in profile.verdicts if one.backend == backend])}")
    from slimvlm.serve.judging.verdict import nothing_faster  # numpy takes a moment to import

    if nothing := nothing_faster(profile):
        print_line(nothing)
    for limit in profile.limits:
        print_line(_limit_line(limit))
    for skipped in profile.skipped:
        print_line(f"skipped  {skipped}")
    print_line(f"written  {written}")


def _show_cell(cell: Cell, kind: str) -> None:
    from slimvlm.serve.judging.limits import peak_memory

    print_line()
    print_line(f"{cell.backend} {cell.dtype}, {cell.workload}{f', {cell.starts} starts' if cell.runs else ''}")
    if not cell.runs:
        print_line(f"  {cell.status}: {cell.reason}")
        return
    rows = []
    for phase, slim in cell.runs["slim"].medians.items():
        dense = cell.runs["dense"].medians[phase] if "dense" in cell.runs else None
        rows.append((f"  {phase}", _milliseconds(dense), _milliseconds(slim), *_ratio(cell.ratios.get(phase))))
    peaks = {name: peak_memory(run.memory, kind) for name, run in cell.runs.items()}
    rows.append(("  peak memory", _mebibytes(peaks.get("dense")), _mebibytes(peaks["slim"]), "", ""))
    print_table(("", "dense", "slim", "dense / slim", ""), rows)


def _decoder_row(test: DecoderTest) -> tuple[str, ...]:
    if not test.runs:
        return f"{test.backend} {test.name}", "", "", "", test.status
    means = {name: f"{run.mean:.1f} ± {run.std:.1f}" for name, run in test.runs.items()}
    return f"{test.backend} {test.name}", means.get("dense", ""), means["slim"], *_ratio(test.ratio)


def _bounds(verdicts: Sequence[Verdict]) -> str:
    """What holds each phase back, over all workloads."""
    found: dict[str, list[str]] = {}
    for one in verdicts:
        if one.bound not in found.setdefault(one.phase, []):
            found[one.phase].append(one.bound)
    return ", ".join(f"{phase} is {' or '.join(bounds)}-bound" for phase, bounds in found.items())


def _ratio(ratio: Ratio | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})", ratio.verdict


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.2f} ms"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / MEBIBYTE:.1f} MiB"


def _limit_line(limit: Limit) -> str:
    state = "crossed" if limit.crossed else "kept"
    worst = "nothing measured" if limit.worst is None else f"{limit.worst:g} ({limit.cell})"
    return f"limit    {limit.name} {limit.limit:g}: {worst}, {state}"
