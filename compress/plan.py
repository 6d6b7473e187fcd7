"""The Plan: which units stay, and everything needed to replay that decision. Small, sorted, diffable JSON; no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from slimvlm.compress.files.decoding import decode, parse

SCHEMA = 2
BLOCK = "block"  # kind of the groups whose units are whole blocks, and last part of their keys
OVERSHOOT = 0.01  # of all parameters


@dataclass(frozen=True, slots=True)
class TowerCount:
    """Parameters and multiply-accumulates per token (linears of the prunable groups) of one tower."""

    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int

    @property
    def removed(self) -> float:
        """Removed fraction of its parameters."""
        return 1 - self.parameters_after / self.parameters_before


@dataclass(frozen=True, slots=True)
class Compensating:
    """What the weights that stay become, and how the samples for it are found again in the data of the plan.

    Attributes:
        name: of a row of COMPENSATIONS.
        samples, eval_samples, prefix_split: the options of `plan` that chose among the data.
        batch_size: samples per batch.
    """

    name: str
    samples: int
    eval_samples: int | None
    prefix_split: bool
    batch_size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A replayable pruning decision.

    Attributes:
        family: name of the family row.
        model_digest: identity of the dense weights the indices refer to.
        criterion, allocator, layout, attention_unit, rounds, seed, options: how the decision was made.
        ratio: asked fraction of ALL parameters to remove.
        prefix_of: the ratio that the decision was made for, where this plan is only its beginning (see `Order`).
        calibration_digest: identity of the samples seen (empty for data-free criteria).
        parameters_before, parameters_after: of the whole model, tied weights counted once.
        towers: the same per tower, with MACs.
        sizes: indices each group had (channels, or query heads).
        keep: per group the sorted indices that stay; groups that keep everything are listed too. What is inside a block
            that leaves is not listed.
        dropped: tower -> blocks at its end that nobody reads and that leave whole.
        dropped_parameters: of them; they leave for free.
        rescued: groups that an allocator without floors would have emptied, and that keep one unit.
        compensation: what is done to the weights that stay; None: nothing.
    """

    family: str
    model_digest: str
    criterion: str
    allocator: str
    layout: str
    attention_unit: str
    rounds: int
    seed: int
    ratio: float
    calibration_digest: str
    parameters_before: int
    parameters_after: int
    towers: Mapping[str, TowerCount]
    sizes: Mapping[str, int]
    keep: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any]
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_parameters: int = 0
    rescued: tuple[str, ...] = ()
    compensation: Compensating | None = None
    prefix_of: float | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if set(self.sizes) != set(self.keep):
            raise ValueError(f"plan: sizes and keep name different groups: {sorted(set(self.sizes) ^ set(self.keep))}")
        for key, kept in self.keep.items():
            if not kept:
                raise ValueError(f"plan: group {key} keeps nothing")
            if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.sizes[key]:
                raise ValueError(f"plan: group {key} must keep sorted, unique indices below {self.sizes[key]}")
        if not 0 < self.parameters_after <= self.parameters_before:
            raise ValueError(f"plan: {self.parameters_after} of {self.parameters_before} parameters are left")
        if min(self.dropped.values(), default=1) < 1 or not 0 <= self.dropped_parameters < self.parameters_before:
            raise ValueError(f"plan: {dict(self.dropped)} blocks with {self.dropped_parameters} parameters are dropped")

    @property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        """Tower -> numbers of the blocks that stay, where blocks were planned."""
        return _blocks(self.keep)

    @property
    def gone(self) -> dict[str, list[int]]:
        """Tower -> numbers of the blocks that leave besides dead ones, where blocks were planned."""
        return {
            tower: sorted(set(range(self.sizes[f"{tower}.{BLOCK}"])) - set(kept)) for tower, kept in self.blocks.items()
        }

    def renamed(self, keys: Iterable[str]) -> dict[str, str]:
        """What groups of the model before are called in the one this plan gives; those in blocks that leave are not."""
        return {key: _after(key, self.blocks) for key in keys if _stays(key, self.blocks)}

    def keeps(self, tower: str, layer: int) -> bool:
        """Whether this block of `tower` stays."""
        return layer in self.blocks.get(tower, (layer,))

    @property
    def removed_fraction(self) -> float:
        """Removed fraction of all parameters."""
        return 1 - self.parameters_after / self.parameters_before

    @property
    def overshoots(self) -> bool:
        """Whether more than a point above the asked fraction is removed, units and not only dead blocks."""
        free = self.dropped_parameters / self.parameters_before
        return self.removed_fraction - max(self.ratio, free) > OVERSHOOT

    def to_json(self) -> str:
        """Sorted JSON, one line per group."""
        document = {one.name: getattr(self, one.name) for one in fields(self)}
        document["towers"] = {name: asdict(count) for name, count in self.towers.items()}
        document["compensation"] = self.compensation and asdict(self.compensation)
        keep = document.pop("keep")
        head = json.dumps(document, indent=2, sort_keys=True)
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(list(keep[key]))}" for key in sorted(keep))
        return head.removesuffix("\n}") + ',\n  "keep": {\n' + lines + "\n  }\n}\n"

    @staticmethod
    def upgraded(document: Mapping[str, Any]) -> Mapping[str, Any]:
        """A document of schema 1, which knew one compensation and no prefixes, as this schema has it; others as is."""
        if document.get("schema") != 1 or "refit" not in document:
            return document
        rest = {name: value for name, value in document.items() if name != "refit"}
        refit = document["refit"]
        compensation = {"name": "refit", **refit} if isinstance(refit, dict) else refit
        return {**rest, "schema": SCHEMA, "compensation": compensation, "prefix_of": None}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of `to_json`.

        Raises:
            ValueError: another schema, or the field that is unknown, missing or wrong.
        """
        return decode(parse(text), cls, "plan")

    def compose(self, later: Plan) -> Plan:
        """The plan that does this one and then `later`, whose indices count what this one kept.

        Raises:
            ValueError: `later` was not made for the model this plan gives.
        """
        names = self.called(later)
        keep, sizes = dict(self.keep), dict(self.sizes)
        for name, key in names.items():
            kept = self.keep.get(name, range(later.sizes[key]))
            _require_equal(name, len(kept), later.sizes[key])
            keep[name] = tuple(kept[i] for i in later.keep[key])
            sizes.setdefault(name, later.sizes[key])
        keep = {name: kept for name, kept in keep.items() if _stays(name, _blocks(keep))}
        told = {_is_block(key) for key in later.keep}  # a plan of blocks only leaves the groups inside them as they are
        for name in keep.keys() - names.keys():
            if told != {not _is_block(name)}:
                _require_equal(name, len(keep[name]), None)
        towers = {
            name: replace(
                count, parameters_after=later.towers[name].parameters_after, macs_after=later.towers[name].macs_after
            )
            for name, count in self.towers.items()
        }
        return replace(
            later,
            model_digest=self.model_digest,
            parameters_before=self.parameters_before,
            towers=towers,
            sizes={name: sizes[name] for name in keep},
            keep=keep,
            dropped={**self.dropped, **later.dropped},
            dropped_parameters=self.dropped_parameters + later.dropped_parameters,
            rescued=(*self.rescued, *later.rescued),
        )

    def called(self, later: Plan) -> dict[str, str]:
        """The groups of `later`, which was made for the model this plan gives, as the model before that calls them."""
        return {_before(key, self.blocks): key for key in later.keep}

    def since(self, earlier: Plan) -> Plan:
        """What is left of this plan to do with the model that `earlier`, a beginning of it, gives: composed after that
        one it is this one.
        """
        known = {name: earlier.keep.get(name, range(self.sizes[name])) for name in self.keep}
        names = earlier.renamed(self.keep)
        towers = {
            name: replace(
                count,
                parameters_before=earlier.towers[name].parameters_after,
                macs_before=earlier.towers[name].macs_after,
            )
            for name, count in self.towers.items()
        }
        return replace(
            self,
            parameters_before=earlier.parameters_after,
            towers=towers,
            sizes={names[name]: len(known[name]) for name in self.keep},
            keep={names[name]: tuple(map(known[name].index, kept)) for name, kept in self.keep.items()},
            dropped={tower: count for tower, count in self.dropped.items() if tower not in earlier.dropped},
            dropped_parameters=self.dropped_parameters - earlier.dropped_parameters,
            rescued=tuple(names[key] for key in self.rescued if key not in earlier.rescued),
        )


def _require_equal(key: str, left: int, expected: int | None) -> None:
    if left != expected:
        raise ValueError(f"plan: group {key} has {left} indices left, the later plan expects {expected}")


def _is_block(key: str) -> bool:
    return key.endswith(f".{BLOCK}")


def _blocks(keep: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {key.removesuffix(f".{BLOCK}"): kept for key, kept in keep.items() if _is_block(key)}


def _place(key: str) -> tuple[str, int | None, str]:
    """(tower, layer, part) of a group; there is no layer where its units are blocks."""
    tower, _, rest = key.partition(".")
    layer, _, part = rest.partition(".")
    return tower, int(layer) if layer.isdecimal() else None, part


def _stays(key: str, blocks: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the group is in none of the blocks that leave when `blocks` stay."""
    tower, layer, _ = _place(key)
    return layer is None or layer in blocks.get(tower, (layer,))


def _before(key: str, blocks: Mapping[str, tuple[int, ...]]) -> str:
    """What a group was called before `blocks` were all that was left."""
    tower, layer, part = _place(key)
    return key if layer is None or tower not in blocks else f"{tower}.{blocks[tower][layer]}.{part}"


def _after(key: str, blocks: Mapping[str, tuple[int, ...]]) -> str:
    """What a group is called once `blocks` are all that is left."""
    tower, layer, part = _place(key)
    return key if layer is None or tower not in blocks else f"{tower}.{blocks[tower].index(layer)}.{part}"
