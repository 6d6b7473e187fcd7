"""Hostile command lines over all commands: counts of cases, tracebacks, hangs and changed inputs; 0 of each is right.

Of its modules `fuzz_values` holds what is put in the place of a value, `fuzz_damage` what is done to a file,
`fuzz_workshop` the sound files cases begin from, `fuzz_cases` how a case is drawn, `fuzz_running` how it is run.

    python tests/support/fuzz.py [--cases 2000] [--first 0] [--jobs 2] [--families llava,clip] [--show]

`--first N --cases 1 --show` runs case N alone and prints what it said.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")

import fuzz_running as running
import fuzz_workshop as workshop


def main() -> int:
    """Run, print the faults and the counts; 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--families", default=",".join(workshop.FAMILIES), metavar="NAMES")
    parser.add_argument("--show", action="store_true", help="print every case")
    given = parser.parse_args()
    started = time.monotonic()
    running.prepare()
    with tempfile.TemporaryDirectory(prefix="fuzz-base-") as name:
        families = given.families.split(",")
        base = workshop.build(Path(name) / "base", families)
        print(f"sound files after {time.monotonic() - started:.0f} s", flush=True)
        seeds = range(given.first, given.first + given.cases)
        outcomes = []
        for outcome in running.run_all(seeds, base, families, given.jobs):
            outcomes.append(outcome)
            if outcome.fault or given.show:
                _show(outcome)
    codes = Counter(str(outcome.code) for outcome in outcomes)
    commands = Counter(outcome.command for outcome in outcomes)
    print("exit codes:", ", ".join(f"{code}: {count}" for code, count in sorted(codes.items())))
    print("commands:", ", ".join(f"{name}: {count}" for name, count in commands.most_common()))
    print("slowest:", ", ".join(f"{one.seed}: {one.seconds:.1f} s" for one in _slowest(outcomes)))
    tracebacks, hangs = (sum(getattr(one, name) for one in outcomes) for name in ("traceback", "hang"))
    changed = sum(bool(one.changed) for one in outcomes)
    print(
        f"{len(outcomes)} cases in {time.monotonic() - started:.0f} s: "
        f"{tracebacks} tracebacks, {hangs} hangs, {changed} changed inputs"
    )
    return int(any(outcome.fault for outcome in outcomes))


def _slowest(outcomes: list[running.Outcome]) -> list[running.Outcome]:
    return sorted(outcomes, key=lambda one: -one.seconds)[:5]


def _show(outcome: running.Outcome) -> None:
    kind = "hang" if outcome.hang else "traceback" if outcome.traceback else "changed" if outcome.changed else "ok"
    print(f"\n=== {outcome.seed} {kind} exit {outcome.code} {outcome.seconds:.1f} s: slimvlm {outcome.line}")
    if outcome.changed:
        print("changed:", ", ".join(map(repr, outcome.changed[:5])))
    print(outcome.said.strip()[-3000:].encode("ascii", "backslashreplace").decode(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
