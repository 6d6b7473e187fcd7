"""From what was seen to one score per unit, comparable over groups; what is one criterion's own is in its file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from slimvlm.compress.criteria.criterion import Criterion
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.files.decoding import dump, parse
from slimvlm.compress.files.writing import load_tensors, save_tensors
from slimvlm.compress.models.families import Experts
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.projections import Member
from slimvlm.compress.statistics.collect import Calibration


@dataclass(frozen=True, eq=False)
class Scores:
    """One importance per unit, and which indices of the group each unit holds.

    Attributes:
        criterion: what made them.
        values: group key -> fp32 [num_units], finite and >= 0.
        members: group key -> int64 [num_units, m], indices of the group (channels or query heads).
        importance: group key -> what it is worth as a whole, for an allocator that asks; finite and >= 0.
    """

    criterion: Criterion
    values: Mapping[str, Tensor]
    members: Mapping[str, Tensor]
    importance: Mapping[str, float] | None = None

    def sparing(self, keys: Collection[str]) -> Scores:
        """The same, but that nothing of these groups goes while another unit may."""
        if not keys:
            return self
        above = 2 * max(float(values.max()) for values in self.values.values()) + 1
        return replace(self, values={key: one + above * (key in keys) for key, one in self.values.items()})

    def save(self, path: Path) -> None:
        """Write one safetensors file; a reader never sees half of it."""
        tensors = {f"values/{key}": value for key, value in self.values.items()}
        tensors |= {f"members/{key}": value for key, value in self.members.items()}
        if self.importance is not None:
            whole = self.importance.items()
            tensors |= {f"importance/{key}": torch.tensor(one, dtype=torch.float64) for key, one in whole}
        save_tensors(path, tensors, {"criterion": self.criterion.facts()})

    @classmethod
    def read(cls, path: Path, criterion: Criterion) -> Scores:
        """What `save` wrote of the scores by `criterion`.

        Raises:
            ValueError: the file is missing or damaged, or the scores are another criterion's.
        """
        tensors, facts = load_tensors(path)
        if facts.get("criterion") != parse(dump(criterion.facts())):
            raise ValueError(f"the scores are by {facts.get('criterion')}, not by {criterion.name}")
        found: dict[str, dict[str, Tensor]] = {"values": {}, "members": {}, "importance": {}}
        for name, tensor in tensors.items():
            kind, _, key = name.partition("/")
            found[kind][key] = tensor
        importance = {key: one.item() for key, one in found["importance"].items()} or None
        return cls(criterion, found["values"], found["members"], importance)


@dataclass(frozen=True)
class Seen:
    """What a criterion judges the groups of one model by.

    Attributes:
        statistics: what was collected for it, in the order it named them.
        model: None: no criterion may look at its weights.
        generator: for chance.
    """

    statistics: Sequence[Mapping[str, Tensor]]
    model: nn.Module | None
    generator: torch.Generator

    def weight(self, member: Member) -> Tensor:
        """The tensor that has `member`, fp32.

        Raises:
            ValueError: there is no model.
        """
        if self.model is None:
            raise ValueError("this criterion needs the model")
        return self.model.get_parameter(f"{member.path}.weight").detach().float()


Score = Callable[[Group, Seen], tuple[Tensor, Tensor]]
NORMALISED: Mapping[str | None, Callable[[Group, Tensor], Tensor]] = {
    None: lambda _, values: values,
    "weights": lambda group, values: values / group.weights_per_unit,
    "mean": lambda _, values: values / values.mean().clamp(min=torch.finfo(values.dtype).tiny),
}


def score_groups(
    groups: Sequence[Group],
    criterion: Criterion,
    calibration: Calibration | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
) -> Scores:
    """One score per unit (biases and norms have none), normalised as the criterion says.

    Query slots are formed here: heads are ranked inside every KV group, slot i holds the i-th lowest of each.

    Args:
        calibration: the statistics; needed unless the criterion looks at no data.
        model: needed where it looks at the weights.
        seed: for `random`.

    Raises:
        ValueError: statistics or model missing.
        CalibrationError: a score is not finite.
    """
    statistics = calibration.seen if calibration is not None else {}
    if missing := [name for name in criterion.calibration().statistics if name not in statistics]:
        raise ValueError(f"the criterion {criterion.name!r} needs calibration statistics: {', '.join(missing)}")
    seen = Seen([statistics[name] for name in criterion.statistics], model, torch.Generator().manual_seed(seed))
    values, members = {}, {}
    for group in groups:
        score, units = criterion.score(group, seen)
        score = NORMALISED[criterion.normalise](group, score)
        if criterion.angles and group.modality == "language":
            score = score * _unit_entropy(group, statistics[criterion.angles], units)
        if not torch.isfinite(score).all():
            raise CalibrationError(f"the scores of {group.key} are not finite; load the model in float32 or bfloat16")
        values[group.key], members[group.key] = score.float(), units
    least = min((float(score.min()) for score in values.values()), default=0.0)
    if least < 0:  # standardised scores have no zero: they keep their differences
        values = {key: score - least for key, score in values.items()}
    return Scores(criterion, values, members)


def unit_sums(
    group: Group, seen: Seen, saliency: Callable[[Member], Tensor], dims: tuple[int, ...] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """(saliency [num_units] summed over the weights of a unit, the units' indices [num_units, m]).

    An expert that no token was sent to adds nothing, and its channels are ranked by the size of their weights.

    Args:
        saliency: of a member, over the rows or columns of its full tensor.
        dims: members that lose rows (0), columns (1).
    """
    scored = [member for member in group.members if member.dim in dims and not member.norm]
    query = _summed(group, saliency, [member for member in scored if _own(member)])
    unsent = ~query.view(group.kv_heads, -1).any(1) if isinstance(group.part, Experts) else torch.tensor([False])
    if unsent.any() and seen.model is not None:
        blank = [member for member in scored if unsent[member.expert]]
        rank = query + _summed(group, lambda member: seen.weight(member).abs().sum(1 - member.dim).cpu(), blank)
        units = units_of(group, rank)
    else:
        units = units_of(group, query)
    sums = query[units].sum(1)
    if not group.slots:
        # A unit that is a head or a KV group takes its own key and value head along, and unit i is KV head i.
        for member in scored:
            if not _own(member):
                sums = sums + _per_index(group, member, saliency(member))
    return sums, units


def _summed(group: Group, saliency: Callable[[Member], Tensor], members: Sequence[Member]) -> Tensor:
    """Sums of the saliency by index of the group, fp64 [size]."""
    sums = torch.zeros(group.size, dtype=torch.float64)
    for member in members:
        own = group.indices_of(member)
        sums[own.start : own.stop] += _per_index(group, member, saliency(member))
    return sums


def _own(member: Member) -> bool:
    return member.heads != "kv"


def _per_index(group: Group, member: Member, vector: Tensor) -> Tensor:
    """Sum of a full-tensor vector over the rows or columns of each channel, query head or KV head: fp64 [count]."""
    return _rows_of(group, member, vector).sum(1)


def _rows_of(group: Group, member: Member, vector: Tensor) -> Tensor:
    """The entries of one member, [channels or heads, width], fp64."""
    ends = {part: part.start + len(group.indices_of(part)) * part.width for part in group.members}
    whole = max(end for part, end in ends.items() if part.path == member.path)
    if len(vector) != whole:
        raise ValueError(f"{group.key}: statistics of {member.path} have {len(vector)} entries, not {whole}")
    return vector[member.start : ends[member]].double().view(-1, member.width)


def units_of(group: Group, importance: Tensor) -> Tensor:
    """Indices of every unit, int64 [num_units, m]; `importance` [size] ranks the heads of query slots."""
    if group.slots:
        by_kv_head = importance.view(group.kv_heads, group.heads_per_kv)
        first = torch.arange(group.kv_heads) * group.heads_per_kv
        return (by_kv_head.argsort(dim=1, stable=True) + first[:, None]).t().contiguous()
    indices = torch.tensor([block.index for block in group.blocks]) if group.blocks else torch.arange(group.size)
    return indices.view(group.num_units, -1)


def _unit_entropy(group: Group, entropy: Mapping[str, Tensor], units: Tensor) -> Tensor:
    """UKMI's second factor, the entropy of the angles between tokens and weight rows (UKMP, AAAI 2025): mean over the
    row-cut matrices a unit has a part in, of the mean entropy of its rows there, fp64 [num_units]. Matrices that
    read no text have none.
    """
    means = []
    for member in group.members:
        if member.norm or member.dim != 0 or member.path not in entropy:
            continue
        rows = _rows_of(group, member, entropy[member.path]).mean(1)
        if member.expert is not None:
            means.append(rows[units[:, member.expert] - group.indices_of(member).start])
        elif _own(member):
            means.append(rows[units].mean(1))
        elif not group.slots:
            means.append(rows)
    return torch.stack(means).mean(0)
