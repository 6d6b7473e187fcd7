"""What is counted in a model before it is planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from slimvlm.compress.models.families import Family, find_family
from slimvlm.compress.models.groups import Dead, Group, count_parameters, dead_blocks

KINDS = ("attention", "mlp")


@dataclass(frozen=True)
class Facts:
    """What a plan must know of a model besides its groups and scores; see `facts_of`.

    Attributes:
        family: its row.
        parameters: of the whole model, tied weights once.
        towers: tower -> parameters of its blocks (norms and biases included).
        macs: tower -> multiply-accumulates per token of the linears of its groups.
        kinds: kind -> prunable parameters.
        sizes: group key -> indices.
        dead: the blocks nobody reads, by tower; they leave before anything else.
        dense: the same of the dense model, if this one is already partly cut.
    """

    family: Family
    parameters: int
    towers: Mapping[str, int]
    macs: Mapping[str, int]
    kinds: Mapping[str, int]
    sizes: Mapping[str, int]
    dead: Mapping[str, Dead] = field(default_factory=dict)
    dense: Facts | None = None


def facts_of(model: nn.Module, groups: Sequence[Group], dense: Facts | None = None) -> Facts:
    """The facts of `model` (real or on the meta device).

    Args:
        model: the model the groups belong to.
        groups: all its groups.
        dense: its facts before any cut, when `model` was cut in an earlier round.
    """
    family = find_family(model.config)
    dead = dead_blocks(model, family)
    macs = {tower.name: dead[tower.name].macs if tower.name in dead else 0 for tower in family.towers}
    kinds = dict.fromkeys(KINDS, 0)
    for group in groups:
        linears = {member.path for member in group.members if not member.norm}
        macs[group.tower] += sum(model.get_parameter(f"{path}.weight").numel() for path in linears)
        kinds[group.kind] += group.num_units * group.parameters_per_unit
    return Facts(
        family=family,
        parameters=count_parameters(model),
        towers={tower.name: count_parameters(model.get_submodule(tower.blocks)) for tower in family.towers},
        macs=macs,
        kinds=kinds,
        sizes={group.key: group.size for group in groups},
        dead=dead,
        dense=dense,
    )
