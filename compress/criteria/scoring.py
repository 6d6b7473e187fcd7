"""How important a unit is: the loss whose gradients count, and the reduction of what was seen to one score per unit.

UKMP (AAAI 2025): only poorly fitted tokens give gradients; |W * G| is summed over everything a unit owns and divided by
the number of its weights, so heads and channels compare; in the language model the entropy of the angles between tokens
and weight rows multiplies it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.files.writing import load_tensors, save_tensors
from slimvlm.compress.models.groups import Group, Member

if TYPE_CHECKING:
    from slimvlm.compress.statistics.collect import Calibration

IGNORED = -100
SALIENCIES = ("first", "vectorized", "second", "mix", "fisher", "gate", "magnitude", "random")


@dataclass(frozen=True)
class Criterion:
    """What makes a unit important. The paper's ablations are a `dataclasses.replace` of one of CRITERIA.

    Attributes:
        name: how it is called.
        saliency: of a weight: `first` |w g|, `vectorized` (signed inside a row), `second` and `mix` (with curvature),
            all with g summed over samples; `fisher` (w g)^2 summed over micro-batches; `gate` (dL/dm)^2 of a unit's
            gate m, summed over examples; `magnitude` |w|; `random` none.
        threshold: tokens count whose largest probability is at most this (or the least of their sample); None: all.
        entropy: multiply by the entropy of the angles (language modality only).
    """

    name: str
    saliency: str
    threshold: float | None = None
    entropy: bool = False

    def __post_init__(self) -> None:
        if self.saliency not in SALIENCIES:
            raise ValueError(f"saliency {self.saliency!r} is unknown; choose one of {', '.join(SALIENCIES)}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(
                f"threshold {self.threshold} is no probability; choose one of 0..1, or None for all tokens"
            )


CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("ukmi", "first", threshold=0.4, entropy=True),
        Criterion("taylor", "first"),
        Criterion("fisher", "fisher"),
        Criterion("gate", "gate"),
        Criterion("magnitude", "magnitude"),
        Criterion("random", "random"),
    )
}


@dataclass(frozen=True, eq=False)
class Scores:
    """One importance per unit, and which indices of the group each unit holds.

    Attributes:
        criterion: what made them.
        values: group key -> fp32 [num_units], finite and >= 0.
        members: group key -> int64 [num_units, m], indices of the group (channels or query heads).
    """

    criterion: Criterion
    values: Mapping[str, Tensor]
    members: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write one safetensors file; a reader never sees half of it."""
        tensors = {f"values/{key}": value for key, value in self.values.items()}
        tensors |= {f"members/{key}": value for key, value in self.members.items()}
        save_tensors(path, tensors, {"criterion": asdict(self.criterion)})

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            CalibrationError: the file is missing or damaged.
        """
        parts: dict[str, dict[str, Tensor]] = {"values": {}, "members": {}}
        try:
            tensors, facts = load_tensors(path)
            criterion = Criterion(**facts["criterion"])
            for name, value in tensors.items():
                part, key = name.split("/", 1)
                parts[part][key] = value
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path} is not a readable score file ({error}); score again") from error
        return cls(criterion, parts["values"], parts["members"])


def poorly_fitted_loss(logits: Tensor, labels: Tensor, threshold: float | None) -> Tensor:
    """Sum over examples of the mean cross entropy (fp32, nats) over each example's poorly fitted positions.

    UKMP section "sub-task selection": positions whose largest probability is at most max(threshold, the smallest such
    probability of the example). Being per example, it does not depend on how examples are batched.

    Args:
        logits: [B, L, V], or [L, V] for one example.
        labels: [B, L] or [L], aligned with the logits (already shifted); -100 is ignored.
        threshold: None takes all positions.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.ndim not in (2, 3) or labels.shape != logits.shape[:-1]:
        raise ValueError(f"poorly_fitted_loss: labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    if logits.ndim == 2:
        logits, labels = logits[None], labels[None]
    valid = labels != IGNORED
    example = valid.nonzero()[:, 0]
    picked = logits[valid].float()
    normaliser = picked.logsumexp(-1)
    losses = normaliser - picked.gather(-1, labels[valid][:, None])[:, 0]
    with torch.no_grad():
        selected = torch.ones_like(losses)
        if threshold is not None:
            confidence = (picked.amax(-1) - normaliser).exp()
            least = confidence.new_ones(len(labels)).scatter_reduce(0, example, confidence, "amin")
            selected = (confidence <= least.clamp_min(threshold)[example]).float()
        counts = torch.zeros(len(labels), device=losses.device).index_add(0, example, selected)
    return (losses * selected / counts[example]).sum()


def score_groups(
    groups: Sequence[Group],
    criterion: Criterion,
    calibration: Calibration | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
) -> Scores:
    """One score per unit: the mean saliency of the weights it owns (biases and norms have none), times its entropy.

    Query slots are formed here: heads are ranked inside every KV group, slot i holds the i-th lowest of each.

    Args:
        calibration: the statistics; needed unless the criterion is `magnitude` or `random`.
        model: needed for `magnitude` (mean |w|).
        seed: for `random`.

    Raises:
        ValueError: statistics or model missing.
        CalibrationError: a score is not finite.
    """
    if criterion.saliency == "random":
        return _random(groups, criterion, seed)
    if criterion.saliency == "magnitude":
        if model is None:
            raise ValueError("the criterion 'magnitude' needs the model")
        saliency: Mapping[str, Tensor] = _magnitudes(groups, model)
    elif calibration is None:
        raise ValueError(f"the criterion {criterion.name!r} needs calibration statistics")
    else:
        saliency = calibration.saliency
    values, members = {}, {}
    for group in groups:
        sums, units = _unit_sums(group, saliency)
        score = sums / group.weights_per_unit
        if criterion.entropy and calibration is not None and group.modality == "language":
            score = score * _unit_entropy(group, calibration.entropy, units)
        if not torch.isfinite(score).all():
            raise CalibrationError(f"the scores of {group.key} are not finite; load the model in float32 or bfloat16")
        values[group.key], members[group.key] = score.float(), units
    return Scores(criterion, values, members)


def _magnitudes(groups: Sequence[Group], model: nn.Module) -> dict[str, Tensor]:
    sums = {}
    for member in (member for group in groups for member in group.members if not member.norm):
        weight = model.get_parameter(f"{member.path}.weight").detach()
        sums[f"{member.path}:{member.dim}"] = weight.abs().sum(1 - member.dim, dtype=torch.float32).cpu()
    return sums


def _random(groups: Sequence[Group], criterion: Criterion, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    values, members = {}, {}
    for group in groups:
        values[group.key] = torch.rand(group.num_units, generator=generator)
        members[group.key] = _units(group, torch.rand(group.size, generator=generator))
    return Scores(criterion, values, members)


def _unit_sums(group: Group, saliency: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(saliency [num_units] summed over all the weights of a unit, the units' indices [num_units, m])."""
    scored = [member for member in group.members if not member.norm]
    own = (_per_index(group, member, saliency[f"{member.path}:{member.dim}"]) for member in scored if _own(member))
    query = sum(own, torch.zeros(()))
    units = _units(group, query)
    sums = query[units].sum(1)
    if group.unit != "query-slot":
        # A unit that is a head or a KV group takes its own key and value head along, and unit i is KV head i.
        for member in scored:
            if not _own(member):
                sums = sums + _per_index(group, member, saliency[f"{member.path}:{member.dim}"])
    return sums, units


def _own(member: Member) -> bool:
    return member.heads != "kv"


def _per_index(group: Group, member: Member, vector: Tensor) -> Tensor:
    """Sum of a full-tensor vector over the rows or columns of each channel, query head or KV head: fp64 [count]."""
    return _rows(group, member, vector).sum(1)


def _rows(group: Group, member: Member, vector: Tensor) -> Tensor:
    """The entries of one member, [channels or heads, width], fp64."""
    count = (group.kv_heads if member.heads == "kv" else group.size) * member.width
    if len(vector) != count * member.parts:
        raise ValueError(
            f"{group.key}: statistics of {member.path} have {len(vector)} entries, not {count * member.parts}"
        )
    return vector[member.part * count : (member.part + 1) * count].double().view(-1, member.width)


def _units(group: Group, importance: Tensor) -> Tensor:
    """Indices of every unit, int64 [num_units, m]; `importance` [size] ranks the heads of query slots."""
    if group.unit == "query-slot":
        by_kv_head = importance.view(group.kv_heads, group.heads_per_kv)
        first = torch.arange(group.kv_heads) * group.heads_per_kv
        return (by_kv_head.argsort(dim=1, stable=True) + first[:, None]).t().contiguous()
    return torch.arange(group.size).view(group.num_units, -1)


def _unit_entropy(group: Group, entropy: Mapping[str, Tensor], units: Tensor) -> Tensor:
    """Mean over the row-cut matrices a unit has a part in, of the mean entropy of its rows there: fp64 [num_units]."""
    means = []
    for member in group.members:
        if member.norm or member.dim != 0:
            continue
        rows = _rows(group, member, entropy[member.path]).mean(1)
        if _own(member):
            means.append(rows[units].mean(1))
        elif group.unit != "query-slot":
            means.append(rows)
    return torch.stack(means).mean(0)
