"""What a model consists of, what can be removed from it, and what that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimvlm.console.printing import print_json, print_line, print_table
from slimvlm.console.progress import duration
from slimvlm.console.show import count, percent
from slimvlm.serve.fitting.goals import QUANTITIES

if TYPE_CHECKING:
    from slimvlm.compress.models.inspection import Discovered, Inspection
    from slimvlm.serve.costing.cost import Cost, StageCost
    from slimvlm.serve.costing.job import Costs

NOT_FITTED = "assumed: no run has been fitted yet, so times are of the right order at best"
NOT_SO = "-"  # a stage that needs the whole model


def show_discovered(found: Discovered, *, as_json: bool) -> None:
    """The prunable parts that were proved, and the rows that say so."""
    if as_json:
        print_json(found.to_dict())
        return
    _print_inspection(found.inspection)
    print_line()
    print_line(found.rows or "The family table has rows for all of it.")


def show_inspection(inspection: Inspection, *, as_json: bool) -> None:
    """Family, parameters, and the prunable parts of every tower."""
    if as_json:
        print_json(inspection.to_dict())
        return
    _print_inspection(inspection)


def _print_inspection(inspection: Inspection) -> None:
    share = inspection.prunable_parameters / inspection.parameters
    print_line(f"family      {inspection.family} ({inspection.model_class})")
    print_line(f"parameters  {count(inspection.parameters)}, {percent(share)} of them prunable")
    for tower, dead in inspection.dead.items():
        print_line(
            f"dead        the last {dead.blocks} in {tower}, nobody reads them: {count(dead.parameters)} go for free"
        )
    print_line()
    columns = ("tower", "kind", "unit", "groups", "units", "parameters per unit", "prunable")
    rows = [
        (
            *(part.tower, part.kind, part.unit, str(part.groups), str(part.units)),
            *(str(part.parameters_per_unit), count(part.prunable_parameters)),
        )
        for part in inspection.parts
    ]
    print_table(columns, rows)


def show_costs(found: Costs, *, as_json: bool) -> None:
    """The blocks of the model, and on each machine seconds, memory and disk of every stage, whole and streamed."""
    if as_json:
        print_json(found.to_dict())
        return
    asked, size = found.asked, QUANTITIES["size"].words
    print_line(
        f"asked    {asked.samples:,} samples of one image of {found.image_side} pixels and {asked.text_tokens} text "
        f"tokens, {asked.rounds} rounds, {asked.ratio:.0%} removed"
    )
    print_line()
    columns = ("blocks", "", "parameters", "bytes", "tokens", "forward per token", "backward", "once more, streamed")
    print_table(
        columns,
        [
            (
                *(part.tower, str(part.blocks), count(part.parameters), size(part.stored_bytes), str(part.tokens)),
                *(f"{flops / 1e6:.3g} M" for flops in (part.forward_flops, part.backward_flops, part.recomputed_flops)),
            )
            for part in found.costs[0].parts
        ],
    )
    for cost in found.costs:
        _print_cost(cost)
    print_line()
    runs = found.costs[0].runs
    print_line(f"factors  {f'fitted to {len(runs)} runs: ' + '; '.join(runs) if runs else NOT_FITTED}")


def _print_cost(cost: Cost) -> None:
    size = QUANTITIES["size"].words
    how = "measured here and now" if cost.measured else "by data sheets and an assumed efficiency: not measured"
    print_line()
    print_line(f"{cost.machine}; {how}")
    columns = ("stage", "whole", "memory", "reads", "streamed", "memory", "reads", "writes", "scratch")
    print_table(columns, [_row(stage) for stage in cost.stages])
    if any(stage.peak_bytes > cost.memory_bytes for stage in cost.stages):
        too_large = ", ".join(stage.name for stage in cost.stages if stage.peak_bytes > cost.memory_bytes)
        print_line(f"memory   {size(cost.memory_bytes)}: too small for the whole model in {too_large}")
    print_line(f"disk     {size(cost.disk_bytes)} must be free")


def _row(stage: StageCost) -> tuple[str, ...]:
    size = QUANTITIES["size"].words
    streamed = (stage.streamed_peak_bytes, stage.streamed_read_bytes)
    return (
        *(stage.name, duration(stage.seconds), size(stage.peak_bytes), size(stage.read_bytes)),
        NOT_SO if stage.streamed_seconds is None else duration(stage.streamed_seconds),
        *(NOT_SO if number is None else size(number) for number in streamed),
        *(size(number) if number else "" for number in (stage.written_bytes, stage.scratch_bytes)),
    )
