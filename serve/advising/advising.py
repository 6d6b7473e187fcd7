"""Advice for one model: what the rules say of it, by its config alone, and what slimvlm measured at such a ratio."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.checkpoint import build_meta
from slimvlm.compress.models.groups import count_parameters, find_blocks, find_groups
from slimvlm.serve.advising.figures import Figure, beside
from slimvlm.serve.advising.rules import DEPTH, Advice, Asked, advise


@dataclass(frozen=True, slots=True)
class Advised:
    """An advice for a model.

    Attributes:
        asked: with the share of the language model, towers without words apart, as the rules have it.
        command: what does it; None where nothing here does.
        figures: ours, to hold against it.
        notes: what of the rules does not fit this model.
    """

    model: str
    family: str
    ratio: float
    asked: Asked
    advice: Advice
    command: str | None
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]


def advise_model(model: str, ratio: float, samples: int, want: str, trust_remote_code: bool = False) -> Advised:
    """What to do with the checkpoint `model` (a folder or a hub name) to remove `ratio` of ALL its parameters.

    Raises:
        CheckpointError: no readable config.
        UnsupportedModelError: an unknown model type, or one without a language model.
    """
    meta, family = build_meta(model, trust_remote_code)
    if family.contrastive:
        raise UnsupportedModelError(
            f"{model} is of the family {family.name}, which has no language model, and the rules are about those; "
            "compare methods on it with slimvlm study"
        )
    groups = find_groups(meta, family)
    facts = facts_of(meta, groups)
    spoken = {tower.name for tower in family.towers if tower.modality == "language"}
    others = [name for name in facts.towers if name not in spoken]
    whole = count_parameters(meta) - sum(facts.towers[name] for name in others)  # its embeddings and head count
    asked = Asked(ratio * count_parameters(meta) / whole, samples, want)
    advice, notes = advise(asked), list[str]()
    able = spoken & {group.tower for group in find_blocks(meta, family)}
    if advice.method == DEPTH and not able:
        notes.append(f"whole blocks of the language model cannot leave in the family {family.name}; cut widths instead")
    if any(group.heads_per_kv > 1 for group in groups if group.kind == "attention"):
        notes.append("this model has grouped queries, which none of the study's models has")
    words = ["slimvlm", "compress", model, "OUT", "--data", "SAMPLES", "--ratio", f"{ratio:g}"]
    words += [word for name, value in advice.options.items() for word in (f"--{name}", value)]
    words += [word for name in others for word in ("--tower-ratio", f"{name}=0")]
    if want == "memory":
        words += ["--variants", "int8"]
    command = shlex.join(words) if advice.method and (able or advice.method != DEPTH) else None
    figures = tuple(beside(ratio, samples > 0))
    return Advised(model, family.name, ratio, asked, advice, command, figures, tuple(notes))
