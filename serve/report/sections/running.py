"""Latency and memory of the dense and the slim model on one device: what got faster, what did not, and why."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import chain

from slimvlm.compress.runs import PROFILE
from slimvlm.serve.judging.intervals import LEVEL, RATIO_RULE
from slimvlm.serve.judging.verdict import BOUND_RULE, nothing_faster
from slimvlm.serve.profile import FAILED, FASTER, MEASURED, OUT_OF_MEMORY, PHASES, SLOWER, TOO_NOISY, Profile, Ratio
from slimvlm.serve.report.charts import Estimate, memory_bars, speedup_dots, time_dots
from slimvlm.serve.report.document import Chart, Code, Finding, Said, change, share, shown
from slimvlm.serve.report.files import RunFiles
from slimvlm.serve.report.sections.running_tables import MIB, Numbered, device_words, interval, number, tables

CHARTED = ("vision", "text", "ttft", "tpot", "end_to_end")  # phases of the speed-up charts; the tables have all
NAMED = 3  # cells or phases that one finding names; the tables have all
GROWN = 0.01  # of memory, that counts as more


def running_section(files: RunFiles) -> Iterator[Said]:
    """What a profile says."""
    profile = files.profile
    if profile is None:
        text = "Latency and memory were not measured: whether the slim model is faster is not known."
        source = "no profile.json"
        if reason := files.stage("profile").get("refused"):
            text, source = f"{text} {shown(reason)}", "run.json: stages.profile.refused"
        yield from (text, Finding(text, source, bad=True))
        return
    cells = [Numbered(number, cell) for number, cell in enumerate(profile.cells, start=1)]
    yield from _notes(profile)
    yield from _findings(profile, cells)
    yield from _charts(cells, profile)
    yield from tables(profile, cells)
    yield Code("Command of the measurement", shlex.join(profile.command))


def _notes(profile: Profile) -> Iterator[str]:
    nature = " The device is a CPU: no figure here is a GPU's." if profile.device.kind == "cpu" else ""
    yield f"Everything here was measured on one device: {device_words(profile.device)}.{nature}"
    yield (
        "Times are medians over rounds, averaged over starts of the models' processes; in every round the models take "
        "turns, so that what slows the machine down slows both. A speed-up is the dense time over the slim one; above "
        f"1 the slim model is faster. Its interval is a {share(LEVEL)} bootstrap over starts, then the rounds of each "
        f"(seed {profile.seed}), widened because the starts are few. The rule is: {RATIO_RULE}."
    )
    yield (
        "Work is counted from the shapes of the models and compared with rates measured on this device. The rule is: "
        f"{BOUND_RULE}."
    )
    yield (
        "Time to first token is from pixels and prompt to the first token; time per token is the mean of the later "
        "ones. Memory is of a process per model, less what the imports took; none where it cannot be read. Loaded is "
        "what the process holds of its own, mapped files are beside it, and the peak holds both; on a GPU the driver's "
        "figure counts every allocator."
    )


# ------------------------------------------------------------------ findings


def _findings(profile: Profile, cells: Sequence[Numbered]) -> Iterator[Finding]:
    if "dense" not in profile.models:
        text = "The dense model was not measured beside the slim one: whether it got faster is not known."
        yield Finding(text, f"{PROFILE}: models", bad=True)
    if sentence := nothing_faster(profile):
        yield Finding(sentence, f"{PROFILE}: cells[].ratios, verdicts", bad=True)
    yield from _slower(cells)
    yield from _limits(profile)
    yield from _unmeasured(profile, cells)
    yield from _noisy(cells)
    yield from _faster(profile, cells)
    yield from _memory(cells)


def _slower(cells: Sequence[Numbered]) -> Iterator[Finding]:
    found = [(ratio, phase, one) for one, phase, ratio in _ratios(cells) if ratio.verdict == SLOWER]
    found.sort(key=lambda entry: entry[0].value)
    if found:
        worst = [f"{PHASES[phase]}, {_where(one)}: {_times(ratio)}" for ratio, phase, one in found]
        text = f"{len(found)} of {len(list(_ratios(cells)))} measured phases got slower: {_some(worst)}."
        yield Finding(text, f"{PROFILE}: cells[].ratios", bad=True)


def _limits(profile: Profile) -> Iterator[Finding]:
    for limit in profile.limits:
        reached = "nothing could be measured" if limit.worst is None else f"the worst is {number(limit.worst)}"
        where = f" ({shown(limit.cell)})" if limit.cell else ""
        relation = "is crossed" if limit.crossed else "holds"
        text = f"The limit {shown(limit.name)} of {number(limit.limit)} {relation}: {reached}{where}."
        yield Finding(text, f"{PROFILE}: limits", bad=limit.crossed)


def _unmeasured(profile: Profile, cells: Sequence[Numbered]) -> Iterator[Finding]:
    for status, words in ((OUT_OF_MEMORY, "did not fit into memory"), (FAILED, "failed")):
        found = [_where(one) + _reason(one.cell.reason) for one in cells if one.cell.status == status]
        found += [
            f"{shown(test.backend)}, {shown(test.name)}" + _reason(test.reason)
            for test in profile.decoder_tests
            if test.status == status
        ]
        if found:
            text = f"{len(found)} {'workload' if len(found) == 1 else 'workloads'} {words}: {_some(found)}."
            yield Finding(text, f"{PROFILE}: cells[].status, .reason; decoder_tests", bad=True)
    for reason in profile.skipped:
        yield Finding(f"Not measured: {shown(reason)}", f"{PROFILE}: skipped", bad=True)


def _reason(reason: str) -> str:
    return f" ({shown(reason)})" if reason else ""


def _noisy(cells: Sequence[Numbered]) -> Iterator[Finding]:
    relations = [ratio.verdict for _, _, ratio in _ratios(cells)]
    if count := relations.count(TOO_NOISY):
        text = (
            f"{count} of {len(relations)} speed-ups are too noisy to decide: measure again on a quiet machine, or with "
            "more rounds."
        )
        yield Finding(text, f"{PROFILE}: cells[].ratios.*.verdict", bad=True)


def _faster(profile: Profile, cells: Sequence[Numbered]) -> Iterator[Finding]:
    """The first workload of every backend speaks for it."""
    for one in first_of_backends(cells):
        gains = [
            f"{PHASES[phase]} {_times(ratio)}"
            for phase, ratio in one.cell.ratios.items()
            if phase in CHARTED and ratio.verdict == FASTER
        ]
        if gains:
            text = f"{_where(one)}, on {shown(profile.device.name)}: {', '.join(gains)} as fast as the dense model."
            yield Finding(text, f"{PROFILE}: cells[{one.number - 1}].ratios")


def _memory(cells: Sequence[Numbered]) -> Iterator[Finding]:
    for one in first_of_backends(cells):
        peaks = {model: run.memory for model, run in one.cell.runs.items()}
        if set(peaks) < {"dense", "slim"}:
            continue
        for field, words in (("host_peak_bytes", "Peak host memory"), ("device_driver_bytes", "Device memory")):
            dense, slim = (getattr(peaks[model], field) for model in ("dense", "slim"))
            if dense and slim is not None:
                grew = slim > (1 + GROWN) * dense
                text = (
                    f"{words} {'rose' if grew else 'went'} from {number(dense / MIB)} to {number(slim / MIB)} MiB "
                    f"({change(dense, slim)}): {_where(one)}."
                )
                yield Finding(text, f"{PROFILE}: cells[{one.number - 1}].runs.*.memory.{field}", bad=grew)


def _ratios(cells: Sequence[Numbered]) -> Iterator[tuple[Numbered, str, Ratio]]:
    for one in cells:
        for phase, ratio in one.cell.ratios.items():
            yield one, phase, ratio


def first_of_backends(cells: Sequence[Numbered]) -> list[Numbered]:
    """The first measured workload of every backend."""
    found: dict[str, Numbered] = {}
    for one in cells:
        if one.cell.status == MEASURED:
            found.setdefault(_backend(one), one)
    return list(found.values())


def _where(one: Numbered) -> str:
    return shown(f"{one.cell.backend} {one.cell.dtype}, {one.cell.workload}")


def _some(found: Sequence[str]) -> str:
    more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return "; ".join(found[:NAMED]) + more


def _times(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} times ({interval(ratio)})"


# ------------------------------------------------------------------ charts


def _charts(cells: Sequence[Numbered], profile: Profile) -> Iterator[Chart]:
    device = shown(profile.device.name)
    firsts = first_of_backends(cells)
    for place, one in enumerate(firsts):
        backend, phases = _backend(one), _shared_phases(one)
        if phases:
            rows = {PHASES[phase]: {name: _samples(one, name, phase) for name in one.cell.runs} for phase in phases}
            title = f"{backend}: median times with the range of the rounds, {one.cell.workload}, on {device}"
            yield time_dots(f"times{place}", title, rows)
        alike = {str(other.number): _speedups(other) for other in cells if _backend(other) == backend}
        speedups = {name: found for name, found in alike.items() if found}
        if speedups:
            title = f"{backend}: speed-up of every workload (numbers of the table), with intervals, on {device}"
            yield speedup_dots(f"speedups{place}", title, speedups)
    memory = {_backend(one): held for one in firsts if (held := peaks(one))}
    if memory:
        yield memory_bars("memory", f"Memory of a process, first workload of every backend, on {device}", memory)


def _backend(one: Numbered) -> str:
    return shown(f"{one.cell.backend} {one.cell.dtype}")


def _shared_phases(one: Numbered) -> list[str]:
    """Phases that every model of the cell has, in the order of PHASES."""
    return [
        phase for phase in PHASES if one.cell.runs and all(run.seconds.get(phase) for run in one.cell.runs.values())
    ]


def _samples(one: Numbered, model: str, phase: str) -> Estimate:
    seconds = [*chain.from_iterable(one.cell.runs[model].seconds[phase])]
    return Estimate(one.cell.runs[model].medians[phase], min(seconds), max(seconds))


def _speedups(one: Numbered) -> dict[str, Estimate]:
    return {
        PHASES[phase]: Estimate(ratio.value, ratio.low, ratio.high)
        for phase in CHARTED
        if (ratio := one.cell.ratios.get(phase))
    }


def peaks(one: Numbered) -> dict[str, tuple[float, float]]:
    """Model -> bytes after loading and at the peak, of the device if it has its own memory, else of the host."""
    found = {}
    for model, run in one.cell.runs.items():
        memory = run.memory
        if memory.device_driver_bytes is not None:
            found[model] = (float(memory.device_driver_bytes), float(memory.device_driver_bytes))
        elif memory.host_peak_bytes is not None:
            loaded = memory.host_loaded_bytes
            found[model] = (float(memory.host_peak_bytes if loaded is None else loaded), float(memory.host_peak_bytes))
    return found
