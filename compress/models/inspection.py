"""What a checkpoint consists of and what can be removed from it, from its config alone: no weights are read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from slimvlm.compress.models.checkpoint import build_meta, config_folder
from slimvlm.compress.models.discovery.discover import Discovery
from slimvlm.compress.models.discovery.rows import as_rows
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import Dead, Group, count_parameters, dead_blocks, find_groups
from slimvlm.compress.models.loaders import read_to_discover


@dataclass(frozen=True, slots=True)
class PartSummary:
    """The groups of one kind in one tower: `units` units of `parameters_per_unit` parameters in `groups` groups."""

    tower: str
    kind: str
    unit: str
    groups: int
    units: int
    parameters_per_unit: int
    prunable_parameters: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model's family, parameters, prunable parts, and by tower the blocks that nobody reads (they leave for free)."""

    family: str
    model_class: str
    parameters: int
    prunable_parameters: int
    dead: Mapping[str, Dead]
    parts: tuple[PartSummary, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return asdict(self)


def inspect_model(
    name: str | os.PathLike[str], attention_unit: str = "auto", trust_remote_code: bool = False
) -> Inspection:
    """Summarise the checkpoint `name` (a folder or a hub name).

    Raises:
        CheckpointError: no readable config.
        UnsupportedModelError: its model type has no row in the family table.
    """
    return _inspect(*build_meta(name, trust_remote_code), attention_unit)


@dataclass(frozen=True, slots=True)
class Discovered:
    """What experiments say of a model: its parts as far as they are understood, the rows that the family table lacks,
    and what was not understood.
    """

    inspection: Inspection
    rows: str
    discovery: Discovery

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {**self.inspection.to_dict(), "rows": self.rows, "unknown": list(self.discovery.unknown)}


def discover_model(
    name: str | os.PathLike[str], attention_unit: str = "auto", trust_remote_code: bool = False
) -> Discovered:
    """Find by experiment what the family table does not say of the checkpoint `name` (a folder or a hub name).

    Raises:
        CheckpointError: no readable config.
        UnsupportedModelError: there is nothing to discover.
    """
    model, found = read_to_discover(config_folder(name), trust_remote_code)
    return Discovered(_inspect(model, found.family, attention_unit), as_rows(found), found)


def _inspect(model: PreTrainedModel, family: Family, attention_unit: str) -> Inspection:
    groups = find_groups(model, family, attention_unit)
    parts = [
        _summarise([group for group in groups if (group.tower, group.kind, group.unit) == key])
        for key in dict.fromkeys((group.tower, group.kind, group.unit) for group in groups)
    ]
    return Inspection(
        family.name,
        type(model).__name__,
        count_parameters(model),
        sum(part.prunable_parameters for part in parts),
        dead_blocks(model, family),
        tuple(parts),
    )


def _summarise(groups: Sequence[Group]) -> PartSummary:
    first = groups[0]
    return PartSummary(
        tower=first.tower,
        kind=first.kind,
        unit=first.unit,
        groups=len(groups),
        units=sum(group.num_units for group in groups),
        parameters_per_unit=first.parameters_per_unit,
        prunable_parameters=sum(group.num_units * group.parameters_per_unit for group in groups),
    )
