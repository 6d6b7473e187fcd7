"""What a compression would do, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from slimvlm.console.printing import print_json, print_line, print_table
from slimvlm.console.progress import duration
from slimvlm.console.show import count, percent
from slimvlm.serve.fitting.goals import QUANTITIES

if TYPE_CHECKING:
    from slimvlm.foreseeing import Foreseen, Step

HOW = (
    "by one batch timed here, times how many there are; a cut model is taken to be faster by as much as it is smaller, "
    "and a search without a figure comes on top"
)
NAMED = 3  # unreadable samples


def show_foreseen(found: Foreseen, *, as_json: bool) -> None:
    """What would be read, removed and written, with times and memory."""
    if as_json:
        print_json({**asdict(found), "seconds": found.seconds})
        return
    seen = found.inspection
    size = QUANTITIES["size"].words
    print_line(f"model    {found.model}: {seen.family}, {count(seen.parameters)} parameters, on {found.device}")
    most = "at most, as the targets need it" if found.fitted else f"{percent(found.removed / seen.parameters)} of all"
    print_line(f"removes  {count(found.removed)} parameters ({most}), from")
    rows = [
        (f"  {part.tower}", part.kind, part.unit, str(part.groups), str(part.units), count(part.prunable_parameters))
        for part in seen.parts
    ]
    print_table(("  tower", "kind", "unit", "groups", "units", "parameters"), rows)
    print_line()
    print_line(f"samples  {', '.join(f'{number:,} for {whom}' for whom, number in found.samples.items())}")
    if not found.held_out:
        print_line("         the evaluation has no images of its own; give --eval-data, or more --data")
    if found.bad:
        print_line(f"         {len(found.bad)} unreadable: {'; '.join(found.bad[:NAMED])}")
    print_line()
    for step in found.steps:
        print_line(f"{step.name:<9}{_time(step):>8}  {step.does}")
    print_line()
    print_line(f"time     about {duration(found.seconds)}, {HOW}")
    if found.calibration_bytes:
        print_line(f"memory   {size(found.calibration_bytes)} in the calibration, as one batch took")
    if found.recovery_bytes:
        print_line(f"         about {size(found.recovery_bytes)} in the recovery, by its weights and activations")
    print_line(f"writes   {found.out}: {', '.join(f'{name} {size(number)}' for name, number in found.files.items())}")
    print_line("         so far nothing")


def _time(step: Step) -> str:
    return "done" if step.done else "" if step.seconds is None else duration(step.seconds)
