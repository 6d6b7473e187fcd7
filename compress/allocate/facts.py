"""What is counted in a model before it is planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from slimvlm.compress.models.families import Family, find_family
from slimvlm.compress.models.groups import Dead, Group, count_parameters, dead_blocks, weigh
from slimvlm.compress.options import KINDS
from slimvlm.compress.plan import BLOCK


@dataclass(frozen=True)
class Facts:
    """What a plan must know of a model besides its groups and scores; see `facts_of`.

    Attributes:
        family: its row.
        config: of the model.
        parameters: of the whole model, tied weights once.
        towers: tower -> parameters of its blocks (norms and biases included).
        macs: tower -> multiply-accumulates per token of the linears of its blocks.
        kinds: kind -> prunable parameters.
        sizes: group key -> indices.
        dead: the blocks nobody reads, by tower; they leave before anything else.
        dense: the same of the dense model, if this one is already partly cut.
    """

    family: Family
    config: object
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
    kinds = dict.fromkeys((*KINDS, BLOCK), 0)
    for group in groups:
        kinds[group.kind] += int(group.parameters.sum())
    return Facts(
        family=family,
        config=model.config,
        parameters=count_parameters(model),
        towers={tower.name: count_parameters(model.get_submodule(tower.blocks)) for tower in family.towers},
        macs={tower.name: weigh(tower, model.get_submodule(tower.blocks).children())[1] for tower in family.towers},
        kinds=kinds,
        sizes={group.key: group.size for group in groups},
        dead=dead_blocks(model, family),
        dense=dense,
    )
