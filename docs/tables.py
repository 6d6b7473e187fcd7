"""The tables of criteria, families, commands and extras in the README: `make readme` writes them, `make test` compares.

A page names its table in a comment, `[[[cog print(tables.commands()) ]]]`, and cog puts it there.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import cogapp

from slimvlm.cli import main as slimvlm
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.models.families import FAMILIES
from slimvlm.compress.statistics.rows import STATISTICS
from slimvlm.console.progress import duration

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/cluster.md", "docs/families.md", "docs/scale.md", "docs/your-model.md")
RESULTS = ROOT / "benchmarks" / "results"
TYPES, SCALE, COSTS = (RESULTS / name for name in ("types.json", "scale.jsonl", "cost.json"))
SCALING = RESULTS / "scaling.json"
WHEN_STREAMED = {"on": "block by block", "off": "whole"}
ADVICE = "a table is not what the registries say; run make readme"


def commands() -> str:
    """Every command as it is called at least, and what it does."""
    rows = []
    for name, command in slimvlm.commands.items():
        context, words = click.Context(command), ["slimvlm", name]
        for parameter in command.params:
            words += parameter.get_usage_pieces(context)
            if parameter.required and isinstance(parameter, click.Option):
                words += [parameter.opts[0], str(parameter.name).upper()]
        rows.append((f"`{' '.join(words)}`", command.get_short_help_str(limit=120)))
    return table(("command", "does"), rows)


def criteria() -> str:
    """The rows of CRITERIA: the first line of their sections in docs/methods.md, and how the data is read for them."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = []
    for name, row in CRITERIA.items():
        said = page.partition(f"\n### {name}\n\n")[2].partition("\n")[0]
        # A backward pass begins with a forward one.
        reads = {STATISTICS[statistic].reads for statistic in row.calibration().statistics}
        rows.append((f"`{name}`", said, min(reads, default="not at all")))
    return table(("criterion", "asks", "reads the data"), rows)


def families() -> str:
    """The rows of FAMILIES, by what kind of model they are."""
    rows = []
    for kind, found in groupby(sorted(FAMILIES, key=lambda row: row.kind), key=lambda row: row.kind):
        rows.append((kind, ", ".join(f"`{row.name}`" for row in found)))
    return table(("kind", "families, a row each; unknown model types are refused"), rows)


def extras() -> str:
    """The optional dependencies of pyproject.toml, and what it says they are for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    purposes = project["tool"]["slimvlm"]["extras"]
    return table(("extra", "for"), ((f"`[{n}]`", purposes[n]) for n in project["project"]["optional-dependencies"]))


def counts() -> str:
    """How many model types come how far, by benchmarks/breadth.py."""
    found = Counter(reached(record) for record in json.loads(TYPES.read_text(encoding="utf-8")).values())
    works = found["works"] + found["works, no export"]
    return (
        f"**Of {found.total()} types {works} work** (inspect, cut, reload in three ways, evaluate), {found['works']} "
        f"of them also export to ONNX with equal tokens; {found['cut only']} are cut only, {found['refused']} refused."
    )


def types() -> str:
    """The records of benchmarks/breadth.py: a type, how far the job comes with it, what is cut, and why no more."""
    rows = []
    for name, record in json.loads(TYPES.read_text(encoding="utf-8")).items():
        cut = ", ".join(record.get("cut", ()))
        why = record.get("why", "").partition("; known")[0].replace("|", "\\|")
        rows.append((f"`{name}`", reached(record), cut, why))
    return table(("type", "how far", "is cut", "why no further"), rows)


def jobs() -> str:
    """The runs of benchmarks/scale.py for whoever waits: minutes and peak memory of every command."""
    rows = []
    for run in _runs():
        sample = run["stages"].get("calibrate", {}).get("per_sample")
        paced = f"{sample:.2g} s" if sample and run["alone"] else ""
        waits = (_waited(run, name) for name in ("plan", "slice", "export"))
        rows.append((run["says"], _read(run), run["machine"]["says"], *waits, paced))
    head = ("model", "read", "machine", "`plan`", "`apply`", "`export`", "a sample more, each round")
    return table(head, rows)


def _waited(run: dict[str, Any], name: str) -> str:
    """Minutes of a stage, unless others used the machine, and GB."""
    stage = run["stages"].get(name, {})
    if "skipped" in stage:
        return "does not fit"
    if "seconds" not in stage:
        return "not run"
    minutes = f"{stage['seconds'] / 60:.1f} min, " if run["alone"] else ""
    return f"{minutes}{stage['peak_bytes'] / 1e9:.1f} GB"


def _read(run: dict[str, Any]) -> str:
    """How a run read its model, and what it did more than others."""
    refit = "" if run["compensation"] == "none" else f", {run['compensation']}"
    return WHEN_STREAMED[run["stream"]] + refit + (f", {run['rounds']} rounds" if run["rounds"] > 1 else "")


def _runs() -> list[dict[str, Any]]:
    """Of benchmarks/scale.py."""
    return [json.loads(line) for line in SCALE.read_text(encoding="utf-8").splitlines()]


def scale() -> str:
    """The runs of benchmarks/scale.py: seconds, peak memory and bytes read of every stage."""
    rows = []
    for run in _runs():
        for name in ("calibrate", "plan", "slice", "export"):
            stage = run["stages"].get(name, {})
            if "seconds" in stage:
                seconds = f"{stage['seconds']:.0f}" if run["alone"] else ""  # not of a machine that others used, too
                size = [f"{stage[kind] / 1e9:.2f}" for kind in ("peak_bytes", "read_bytes", "written_bytes")]
                rows.append((run["says"], _read(run), name, seconds, *size))
    return table(("model", "read", "stage", "seconds", "peak GB", "GB read", "GB written"), rows)


def costs() -> str:
    """What benchmarks/scale.py --fit says that a compression of real models takes on known machines."""
    rows = []
    for cost in json.loads(COSTS.read_text(encoding="utf-8")):
        stages = {stage["name"]: stage for stage in cost["stages"]}
        done = [stages[name] for name in ("plan", "slice", "export")]
        times = [duration(sum(stage[kind] for stage in done)) for kind in ("seconds", "streamed_seconds")]
        peaks = [max(stage[kind] for stage in done) / 1e9 for kind in ("peak_bytes", "streamed_peak_bytes")]
        fits = peaks[0] * 1e9 <= cost["memory_bytes"]
        whole = (times[0] if fits else "does not fit", f"{peaks[0]:.3g}")
        streamed = (times[1], f"{peaks[1]:.3g}")
        rows.append((cost["model"], cost["machine"], *whole, *streamed, f"{cost['disk_bytes'] / 1e9:.3g}"))
    head = ("model", "machine", "whole", "GB of memory", "block by block", "GB of memory", "GB of disk")
    return table(head, rows)


def scaling() -> str:
    """What benchmarks/scaling.py measured: seconds of the same work by several processes, and what that gains."""
    measured = json.loads(SCALING.read_text(encoding="utf-8"))["rows"]
    alone, *others = measured
    rows = []
    for name, seconds in alone["seconds"].items():
        faster = (f"{row['seconds'][name]:.1f} s, {seconds / row['seconds'][name]:.2f} x" for row in others)
        rows.append((name, f"{seconds:.1f} s", *faster))
    read = (f"{row['read_bytes'] / 1e9:.2f} GB" for row in measured)
    rows.append(("read by each, block by block", *read))
    return table(("work", "1 process", *(f"{row['processes']} processes" for row in others)), rows)


def reached(record: dict[str, dict[str, str]]) -> str:
    """How far a type comes, in words."""
    done = [stage for stage, said in record["stages"].items() if said == "ok"]
    words = {"export": "works", "evaluate": "works, no export", "reload": "cut only", "cut": "cut only"}
    return words.get(done[-1] if done else "", "refused")


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    pages = [str(ROOT / page) for page in PAGES]
    told = ["--check", "--diff", f"--check-fail-msg={ADVICE}"] if "--check" in sys.argv else ["-r"]
    sys.exit(cogapp.Cog().main(["cog", "-P", "-I", str(ROOT / "docs"), "-p", "import tables", *told, *pages]))
