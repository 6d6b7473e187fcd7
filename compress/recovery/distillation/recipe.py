"""What a recovery run learns from, and in which order: recipes and the stages made of them. No torch is imported.

The recipe `lpd` is the progressive distillation of UKMP (AAAI 2025, Eq. 13-14): the supervised blocks grow from shallow
to deep and from the vision tower to the language towers; then features give way to the task and the teacher's logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import Family, Tower

LOSSES = ("sft", "kl", "rkl", "hidden")
TAUGHT = ("kl", "rkl", "hidden")  # the losses that need the teacher
TASK_SAMPLES = 275  # thousands, as all sample counts of the paper's schedule


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the student learns from.

    Attributes:
        losses: name (of LOSSES) -> weight, at the model's output.
        block_share: part of the steps in which first every cut block learns by itself; 0: none. Where nothing else is
            learnt from, all of them.
        features: also supervise block outputs.
        staged: grow the set of supervised blocks, then drop it; otherwise everything is supervised all the time.
        feature_share: part of the samples that the feature stages get; None: what the paper's schedule gives them.
        literal: the paper's own normalisations and weights instead of those that do not depend on batch and width.
        temperature: of `kl` and `rkl`, which are multiplied by its square.
        hidden_states: which states `hidden` compares, counted as transformers does (-1: after the final norm).
    """

    losses: Mapping[str, float]
    block_share: float = 0.0
    features: bool = False
    staged: bool = False
    feature_share: float | None = None
    literal: bool = False
    temperature: float = 1.0
    hidden_states: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        if not (self.block_share or self.whole):
            raise UnsuitableOptionError(f"the recipe has nothing to learn from; {ACCEPTED}")
        for name, weight in self.losses.items():
            if name not in LOSSES:
                raise UnsuitableOptionError(f"the loss {name!r} is unknown; {ACCEPTED}")
            if not (math.isfinite(weight) and weight > 0):
                raise UnsuitableOptionError(f"the weight {weight} of {name!r} is not a positive number; {ACCEPTED}")
        if not 0 <= self.block_share < 1:
            raise UnsuitableOptionError(
                f"the share {self.block_share} of the blocks leaves nothing to them or to the model; choose one "
                "between 0 and 1, such as 0.3"
            )
        if self.feature_share is not None and not 0 < self.feature_share < 1:
            raise UnsuitableOptionError(
                f"the share {self.feature_share} of the feature stages leaves nothing to them or to the answers; "
                "choose one between 0 and 1, such as 0.2"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UnsuitableOptionError(f"the temperature {self.temperature} is not positive; 1 changes nothing")
        if "hidden" in self.losses and not self.hidden_states:
            raise UnsuitableOptionError("the loss 'hidden' needs a hidden state to compare; -1 is the last")

    @property
    def whole(self) -> bool:
        """Whether anything is learnt by the model as a whole."""
        return self.features or any(self.losses.values())

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is learnt from the dense model."""
        return bool(self.block_share) or self.features or any(name in TAUGHT for name in self.losses)

    def block_steps(self, steps: int) -> int:
        """How many of the steps of a run every cut block learns by itself; one at least is left to what follows."""
        if not (self.block_share and self.whole):
            return steps if self.block_share else 0
        return min(max(1, round(self.block_share * steps)), steps - 1)


PROGRESSIONS: Mapping[str, Recipe] = {  # a row: a recipe whose supervised blocks grow, by its term
    # The paper gives features 37 to 54 % of the samples, which on few steps is missing at the end.
    "lpd": Recipe({"sft": 1.0, "kl": 1.0, "hidden": 1.0}, features=True, staged=True, feature_share=0.2),
    "lpd-paper": Recipe({"sft": 1.0, "kl": 1.0}, features=True, staged=True, literal=True),
}
STARTS: Mapping[str, float] = {"blockwise": 0.3}  # a row: what a recipe can begin with -> its share of the steps
ACCEPTED = (
    f"accepted are {', '.join(PROGRESSIONS)} and sums of {', '.join(LOSSES)}, with weights if wanted, such as "
    f"'sft+0.5*kl', and {', '.join(STARTS)} alone or before them, as 'blockwise+lpd'"
)


@dataclass(frozen=True, slots=True)
class BlockTarget:
    """A supervised block of the student: its output is to be the teacher's. `weight` multiplies its feature loss."""

    tower: str
    layer: int
    weight: float

    @property
    def key(self) -> str:
        """`vision.3`: how the output is called among a teacher's."""
        return f"{self.tower}.{self.layer}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the run, `share` of its samples, with one set of supervised blocks and losses (name -> weight)."""

    name: str
    blocks: tuple[BlockTarget, ...]
    losses: Mapping[str, float]
    share: float


@dataclass(frozen=True, slots=True)
class _Pace:
    """How the paper treats a kind of tower: part of the supervised blocks that is shallow, samples (thousands) of the
    shallow and of the full stage, weight beta of its normalised squared error.
    """

    shallow: tuple[int, int]
    samples: tuple[int, int]
    beta: float


PACES: Mapping[str, _Pace] = {
    "vision": _Pace(shallow=(3, 5), samples=(20, 20), beta=1e6),
    "encoder": _Pace(shallow=(1, 2), samples=(80, 40), beta=1e9),
    "decoder": _Pace(shallow=(1, 2), samples=(80, 80), beta=1e8),
}


def parse_recipe(text: str) -> Recipe:
    """A recipe of PROGRESSIONS, or a sum of losses such as `sft`, `kl+hidden`, `sft+0.5*kl`.

    To the losses of a progression's last stage others join, or weigh anew: `lpd+rkl`, `lpd+0.5*kl`, `lpd+0*hidden` for
    none. What STARTS names comes before them, or alone: `blockwise`, `blockwise+lpd`.

    Raises:
        UnsuitableOptionError: an unknown or repeated loss, or a weight that is not positive.
    """
    terms = [term.strip() for term in text.split("+")]
    starts = [term for term in terms if term in STARTS]
    if len(starts) > 1:
        raise UnsuitableOptionError(f"recipe {text!r}: {starts[0]!r} comes twice; give it once")
    terms = [term for term in terms if term not in STARTS]
    block_share = sum(STARTS[term] for term in starts)
    rows = {term: PROGRESSIONS[term] for term in terms if term in PROGRESSIONS}
    row = next(iter(rows.values()), None)
    if len(rows) > 1:
        raise UnsuitableOptionError(
            f"recipe {text!r}: one of {', '.join(PROGRESSIONS)} excludes the others; {ACCEPTED}"
        )
    losses = dict(row.losses) if row else {}
    given: set[str] = set()
    for term in terms:
        factor, star, name = (part.strip() for part in term.rpartition("*"))
        if name not in LOSSES and term not in PROGRESSIONS:
            raise UnsuitableOptionError(f"recipe {text!r}: {name!r} is no loss; {ACCEPTED}")
        if name in given:
            raise UnsuitableOptionError(f"recipe {text!r}: {name!r} comes twice; give its weight once, as '2*{name}'")
        given.add(name)
        if term not in PROGRESSIONS:
            losses[name] = _weight(text, factor) if star else 1.0
    if row is None:
        return Recipe(losses, block_share)
    losses = {name: weight for name, weight in losses.items() if weight != 0}
    return replace(row, losses=losses, block_share=block_share)


def _weight(text: str, factor: str) -> float:
    try:
        return float(factor)
    except ValueError:
        raise UnsuitableOptionError(f"recipe {text!r}: {factor!r} is no number; {ACCEPTED}") from None


def supervised_layers(depth: int) -> tuple[int, ...]:
    """Every second block counted back from the last: the paper's 0, 2, .. 38 of 39 and 1, 3, .. 23 of 24."""
    return tuple(range((depth - 1) % 2, depth, 2))


def make_stages(family: Family, depths: Mapping[str, int], recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a run, in order; their shares sum to one.

    Args:
        depths: tower name -> number of blocks of the student.

    Raises:
        ValueError: a tower of the family has no depth, or no block.
    """
    for tower in family.towers:
        if depths.get(tower.name, 0) < 1:
            raise ValueError(f"tower {tower.name!r} of {family.name!r} has no block; got depths {dict(depths)}")
    if not recipe.features:
        return (Stage("task", (), dict(recipe.losses), 1.0),)
    full = {tower.name: supervised_layers(depths[tower.name]) for tower in family.towers}
    if not recipe.staged:
        return (Stage("all", _targets(family, full, recipe), dict(recipe.losses), 1.0),)
    stages: list[Stage] = []
    reached: dict[str, tuple[int, ...]] = {}
    for tower in family.towers:
        pace = PACES[_kind(family, tower)]
        part, of = pace.shallow
        layers = full[tower.name]
        shallow = layers[: max(1, len(layers) * part // of)]
        for suffix, chosen, samples in zip((" shallow", ""), (shallow, layers), pace.samples, strict=True):
            reached[tower.name] = chosen
            stages.append(Stage(tower.name + suffix, _targets(family, reached, recipe), {}, samples))
    if recipe.losses:
        features = sum(stage.share for stage in stages)
        task = TASK_SAMPLES if recipe.feature_share is None else features * (1 / recipe.feature_share - 1)
        stages.append(Stage("task", (), dict(recipe.losses), task))
    total = sum(stage.share for stage in stages)
    return tuple(replace(stage, share=stage.share / total) for stage in stages)


def stage_bounds(stages: tuple[Stage, ...], total_steps: int) -> tuple[int, ...]:
    """The step after the last of each stage: cumulative, the last is `total_steps`.

    Every stage gets a step if there are enough of them; the shares are met within one step otherwise.

    Raises:
        ValueError: no stage, or a negative number of steps.
    """
    if not stages or total_steps < 0:
        raise ValueError(f"{len(stages)} stages and {total_steps} steps cannot be scheduled")
    least = 1 if total_steps >= len(stages) else 0
    bounds: list[int] = []
    share = 0.0
    for index, stage in enumerate(stages):
        share += stage.share
        first = (bounds[-1] if bounds else 0) + least
        last = total_steps - least * (len(stages) - index - 1)
        bounds.append(min(max(round(share * total_steps), first), last))
    return (*bounds[:-1], total_steps)


def match_blocks(kept: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Which teacher layer each layer of a tower that lost whole layers is to follow: the one whose output the next kept
    layer read in the teacher, so that a layer also does the work of the removed ones behind it.

    Args:
        kept: sorted layers of the teacher that stay.
        depth: number of layers of the teacher.

    Raises:
        ValueError: `kept` is empty, unsorted or not below `depth`.
    """
    if not kept or kept[0] < 0 or kept[-1] >= depth or any(left >= right for left, right in pairwise(kept)):
        raise ValueError(f"kept layers must be sorted, unique and below {depth}, got {list(kept)}")
    return (*(following - 1 for following in kept[1:]), depth - 1)


def _kind(family: Family, tower: Tower) -> str:
    """Which of the paper's three towers this one is like; the only language tower of a decoder-only model decodes."""
    if tower.modality == "vision":
        return "vision"
    return "decoder" if family.labels_shifted or tower.name == "decoder" else "encoder"


def _targets(family: Family, layers: Mapping[str, tuple[int, ...]], recipe: Recipe) -> tuple[BlockTarget, ...]:
    """The default weights give the mean over a tower's blocks and the sum over towers: stages compare."""
    targets = []
    for tower in family.towers:
        chosen = layers.get(tower.name, ())
        for layer in chosen:
            weight = PACES[_kind(family, tower)].beta if recipe.literal else 1 / len(chosen)
            targets.append(BlockTarget(tower.name, layer, weight))
    return tuple(targets)
