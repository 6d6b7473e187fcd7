"""What a model consists of, and what can be removed from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimvlm.console.printing import print_json, print_line, print_table
from slimvlm.console.show import count, percent

if TYPE_CHECKING:
    from slimvlm.compress.models.inspection import Discovered, Inspection


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
