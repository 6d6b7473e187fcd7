"""What a block costs at every width, on one device: milliseconds that were measured, and what lies between them.

The latency table of ZipLM (Kurtic et al., 2023) and HALP (arXiv 2110.10811), for the blocks of a vision-language model:
per kind of block (attention or MLP of one tower) how much time the whole model wins when all its blocks of that kind
keep only a share of their units. It is shared among the blocks of the kind by their parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import nn

from slimvlm.compress.allocate.costs import Times
from slimvlm.compress.allocate.pool import Floats
from slimvlm.compress.errors import OutputError, UnsuitableOptionError
from slimvlm.compress.files.decoding import dump, read
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.models.groups import Group
from slimvlm.compress.plan import Plan

SCHEMA = 1
NOISIEST = 0.1  # a time that may as well be a tenth off says little of widths
MADE_ANEW = "remove it: it is measured again"


@dataclass(frozen=True, slots=True)
class Setting:
    """What a table holds for; another one needs a table of its own.

    Attributes:
        shape: digest of the names and shapes of all weights.
        device: name of the processor; threads: of one operation on it.
        backend: as `onnx:int8`.
        image_size: None: the processor's own; prompt_tokens: None: those of a short question with its image.
    """

    shape: str
    device: str
    threads: int
    versions: Mapping[str, str]
    backend: str
    batch_size: int
    image_size: tuple[int, int] | None
    prompt_tokens: int | None
    new_tokens: int

    @property
    def digest(self) -> str:
        """Its name in a cache."""
        return hashlib.sha256(dump(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    def difference(self, other: Setting) -> str:
        """The first thing that differs, as `device A, not B`."""
        mine, others = asdict(self), asdict(other)
        name = next(name for name in mine if mine[name] != others[name])
        return f"{name.replace('_', ' ')} {mine[name]}, not {others[name]}"


@dataclass(frozen=True, slots=True)
class Point:
    """All blocks of one kind at one width.

    Attributes:
        kept: share of their units that stays.
        share: phase -> the model's time as a share of the dense one's, both measured in turns.
        noise: phase -> by how much of itself that share would be another with one start of the processes less.
    """

    kept: float
    share: Mapping[str, float]
    noise: Mapping[str, float]

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise ValueError(f"a width of {self.kept:g} of the dense one; accepted is between 0 and 1")
        if set(self.share) != set(self.noise):
            raise ValueError("share and noise name different phases")
        if min((*self.share.values(), 1.0)) <= 0 or min((*self.noise.values(), 0.0)) < 0:
            raise ValueError("a share of time is above 0, and noise not below it")


@dataclass(frozen=True, slots=True)
class CostTable:
    """See the top of this file.

    Attributes:
        dense: phase -> milliseconds of the dense model.
        points: kind of block, as `language.mlp` -> what was measured, the widest first.
    """

    setting: Setting
    dense: Mapping[str, float]
    points: Mapping[str, tuple[Point, ...]]
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for kind, points in self.points.items():
            if [point.kept for point in points] != sorted({point.kept for point in points}, reverse=True):
                raise ValueError(f"the widths of {kind} are not in falling order")
            if missing := [phase for phase in self.dense for point in points if phase not in point.share]:
                raise ValueError(f"{kind} was not measured in {missing[0]}")
        if not all(time > 0 for time in self.dense.values()):
            raise ValueError("a time is not above 0")

    def saved(self, kind: str, phase: str, kept: Floats) -> Floats:
        """Milliseconds the model wins when the blocks of a kind keep these shares of their units: linear between the
        points, never less for a smaller width, and as much as at the smallest one below it.
        """
        points = self.points.get(kind, ())
        won = np.maximum.accumulate([0.0, *(self.dense[phase] * (1 - point.share[phase]) for point in points)])
        widths = [1.0, *(point.kept for point in points)]
        return np.asarray(np.interp(kept, widths[::-1], won[::-1]))

    def times(self, groups: Iterable[Group], limits: Mapping[str, float]) -> Times:
        """What units are ranked by: per group and width the milliseconds won, each phase as a share of its limit.

        Args:
            groups: all groups of the dense model.
            limits: phase -> milliseconds that are allowed.
        """
        groups = list(groups)
        weights, curves = shares_of_kinds(groups), dict[str, tuple[Floats, Floats]]()
        for group in groups:
            kept = np.array(sorted({0.0, 1.0, *(point.kept for point in self.points.get(kind_of(group), ()))}))
            won = sum(self.saved(kind_of(group), phase, kept) / limit for phase, limit in limits.items())
            curves[group.key] = kept, weights[group.key] * np.asarray(won)
        parameters = sum(int(group.parameters.sum()) for group in groups)
        return Times(curves, sum(float(won[0]) for _, won in curves.values()) / parameters)

    def predict(self, plan: Plan, groups: Iterable[Group]) -> dict[str, float]:
        """Phase -> milliseconds of the model that a plan leaves.

        Args:
            groups: all groups of the dense model, whatever the plan chooses among.
        """
        groups = list(groups)
        weights = shares_of_kinds(groups)
        kept = {group.key: np.array(_kept(plan, group)) for group in groups}
        return {
            phase: time - sum(weights[g.key] * float(self.saved(kind_of(g), phase, kept[g.key])) for g in groups)
            for phase, time in self.dense.items()
        }

    def noise(self, phases: Iterable[str] = ()) -> tuple[float, str]:
        """The largest of some phases, or of all, and where."""
        wanted = [phase for phase in self.dense if phase in set(phases)] or self.dense
        found = [
            (point.noise[phase], f"{phase} with {kind} at {point.kept:.0%}")
            for kind, points in self.points.items()
            for point in points
            for phase in wanted
        ]
        return max(found, default=(0.0, ""))

    def refuse_noise(self, phases: Iterable[str] = ()) -> CostTable:
        """Itself.

        Args:
            phases: that widths are chosen by; none: all.

        Raises:
            UnsuitableOptionError: its times are too noisy to choose widths by.
        """
        noise, where = self.noise(phases)
        if noise > NOISIEST:
            raise UnsuitableOptionError(
                f"this machine is too noisy to choose widths by time: {where} is known to {noise:.0%} only, "
                f"{NOISIEST:.0%} is accepted; let it do nothing else meanwhile, or fit to size or params"
            )
        return self

    def save(self, path: Path) -> None:
        """Write it; a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, dump(asdict(self), indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, path: Path, setting: Setting) -> CostTable:
        """The table in `path`, which must be of this setting.

        Raises:
            OutputError: it cannot be read, or is of another device, model or workload.
        """
        table = read(path, cls, OutputError, MADE_ANEW)
        if table.setting != setting:
            raise OutputError(f"{path} was measured for {table.setting.difference(setting)}; {MADE_ANEW}")
        return table


def kind_of(group: Group) -> str:
    """The kind of its block, as `language.mlp`."""
    return f"{group.tower}.{group.kind}"


def shares_of_kinds(groups: Iterable[Group]) -> dict[str, float]:
    """Group key -> its share of the parameters of its kind."""
    groups, totals = list(groups), dict[str, int]()
    for group in groups:
        totals[kind_of(group)] = totals.get(kind_of(group), 0) + int(group.parameters.sum())
    return {group.key: float(group.parameters.sum()) / totals[kind_of(group)] for group in groups}


def shape_digest(model: nn.Module) -> str:
    """Of the names and shapes of its weights: what they cost to run depends on nothing else of them."""
    shapes = sorted((name, tuple(weight.shape)) for name, weight in model.named_parameters())
    return hashlib.sha256(dump(shapes).encode()).hexdigest()


def _kept(plan: Plan, group: Group) -> float:
    """Share of the group's indices that stays; none where its block leaves."""
    if not plan.keeps(group.tower, group.layer):
        return 0.0
    return len(plan.keep.get(group.key, range(group.size))) / group.size
