"""What was removed: parameters per tower, heads and channels per layer, and the scores that decided it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from slimvlm.compress.errors import OutputError
from slimvlm.compress.models.families import MODALITIES
from slimvlm.compress.plan import BLOCK, Plan
from slimvlm.compress.runs import FIT, PLAN, SCORES
from slimvlm.serve.fitting.record import Fit
from slimvlm.serve.report.charts import kept_bars, score_steps, size_bars
from slimvlm.serve.report.document import Chart, Finding, Said, Table, change, figure, percent, shown, whole
from slimvlm.serve.report.files import RunFiles, Scored

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
UNITS = {
    "mlp": "MLP channels",
    "attn": "attention heads",
    "cross_attn": "cross-attention heads",
    "experts": "channels of all experts",
}


Layers = dict[int, tuple[int, int]]  # of one kind of units in one tower: layer -> (had, keeps)


def removed_section(files: RunFiles) -> Iterator[Said]:
    """The plan in bars and tables."""
    plan = files.plan
    if plan is None:
        yield "No plan was made yet: the stage `plan` is not finished."
        return
    yield (
        "The towers' figures count what can be cut: the attention and MLP weights of their blocks. Embeddings, norms, "
        "projector and output head stay, and count in the whole model only."
    )
    yield from _findings(plan)
    if files.fit is not None:
        yield from (Finding(sentence, f"{FIT}: goals, trials, chosen") for sentence in files.fit.sentences)
        yield _trials_table(files.fit)
    yield from (_size_chart(plan), _size_table(plan))
    for number, ((tower, part), layers) in enumerate(sorted(_parts(plan).items())):
        title = f"{tower}: {UNITS.get(part, part)} kept per layer"
        numbers, counts = zip(*sorted(layers.items()), strict=True)
        sizes, kept = zip(*counts, strict=True)
        yield kept_bars(f"kept{number}", shown(title), numbers, kept, sizes)
        yield _layer_table(title, layers, f"{PLAN}: sizes and keep of {tower}.*.{part}")


def scores_section(files: RunFiles) -> Iterator[Said]:
    """How the importance of the units is distributed, per modality."""
    if files.scores is None or files.plan is None:
        yield "No scores are there: the stage `plan` is not finished."
        return
    by_modality = _by_modality(files.scores)
    yield (
        f"One score per unit that could still be cut, by the criterion {shown(files.scores.criterion)}; the units with "
        "the lowest scores go first, within the limits of the budget."
    )
    if files.plan.rounds > 1:
        yield (
            f"The plan was made in {files.plan.rounds} rounds; these are the scores of the last one, on the model as "
            "the rounds before had cut it. What left earlier has no score here."
        )
    if any((values > 0).any() for values in by_modality.values()):
        yield score_steps("scores", "Distribution of the scores per modality", by_modality)
    yield _score_table(by_modality)


def _trials_table(fit: Fit) -> Table:
    rows = [
        (trial.backend, percent(trial.ratio), trial.words, "yes" if trial == fit.chosen else "") for trial in fit.trials
    ]
    title = f"Candidates for {' and '.join(map(str, fit.goals))}"
    return Table(title, ("precision", "removed", "what it costs", "delivered"), rows, f"{FIT}: trials", texts=4)


def _findings(plan: Plan) -> Iterator[Finding]:
    before, after = plan.parameters_before, plan.parameters_after
    yield Finding(
        f"{percent(plan.removed_fraction)} of all parameters are gone: {whole(before)} before, {whole(after)} after "
        f"({percent(plan.ratio)} was asked for).",
        f"{PLAN}: parameters_before, parameters_after, ratio",
    )
    for tower, blocks in plan.dropped.items():
        text = f"The last {blocks} blocks of {shown(tower)} left whole and for free: nothing reads their output."
        yield Finding(text, f"{PLAN}: dropped, dropped_parameters ({whole(plan.dropped_parameters)})")
    for tower, gone in plan.gone.items():
        numbers = f" (counted from 0: {', '.join(map(str, gone))})" if gone else ""
        text = (
            f"Of the {len(gone) + len(plan.blocks[tower])} blocks of {shown(tower)}, {len(gone)} left whole{numbers}."
        )
        yield Finding(text, f"{PLAN}: keep of {shown(tower)}.{BLOCK}")
    if plan.overshoots:
        text = f"That is {percent(plan.removed_fraction - plan.ratio)} of all parameters more than was asked for."
        yield Finding(text, f"{PLAN}: parameters_after, ratio", bad=True)
    if plan.rescued:
        groups = ", ".join(map(shown, plan.rescued))
        text = f"{groups} would have been emptied and keep one unit each."
        yield Finding(text, f"{PLAN}: rescued", bad=True)


def _parts(plan: Plan) -> dict[tuple[str, str], Layers]:
    """Tower and part -> its layers."""
    parts: defaultdict[tuple[str, str], Layers] = defaultdict(dict)
    for key, size in plan.sizes.items():
        if key.endswith(f".{BLOCK}"):
            continue
        pieces = key.rsplit(".", 2)
        if len(pieces) != 3 or not pieces[1].isdecimal():
            raise OutputError(f"{PLAN}: group {shown(key)!r} is not TOWER.LAYER.PART; make the plan again")
        tower, layer, part = pieces
        parts[tower, part][int(layer)] = (size, len(plan.keep[key]))
    return parts


def _size_chart(plan: Plan) -> Chart:
    towers = sorted(plan.towers.items())
    names = ["whole model", *(name for name, _ in towers)]
    before = [plan.parameters_before, *(tower.parameters_before for _, tower in towers)]
    after = [plan.parameters_after, *(tower.parameters_after for _, tower in towers)]
    return size_bars("sizes", "Parameters before and after", names, before, after)


def _size_table(plan: Plan) -> Table:
    rows = [("parameters, whole model", *_sizes(plan.parameters_before, plan.parameters_after))]
    for name, tower in sorted(plan.towers.items()):
        rows.append((f"parameters, {name}", *_sizes(tower.parameters_before, tower.parameters_after)))
    for name, tower in sorted(plan.towers.items()):
        rows.append((f"multiply-adds per token, {name}", *_sizes(tower.macs_before, tower.macs_after)))
    source = f"{PLAN}: parameters_before, parameters_after, towers"
    return Table("Sizes", ("", "before", "after", "change"), rows, source)


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return whole(before), whole(after), change(before, after)


def _layer_table(title: str, layers: Layers, source: str) -> Table:
    had, keeps = (sum(counts[side] for counts in layers.values()) for side in (0, 1))
    rows = [
        (str(layer), whole(had), whole(keeps), percent(keeps / had))
        for layer, (had, keeps) in (*sorted(layers.items()), ("all", (had, keeps)))
    ]
    return Table(title, ("layer", "dense", "kept", "share kept"), rows, source)


def _by_modality(scores: Scored) -> dict[str, np.ndarray]:
    """Scores of all groups of a modality, f32 [units]; a tower this version does not know stands for itself."""
    found: dict[str, list[np.ndarray]] = {}
    for key, values in sorted(scores.values.items()):
        tower = key.rsplit(".", 2)[0]
        found.setdefault(MODALITIES.get(tower, tower), []).append(values)
    return {name: np.concatenate(values) for name, values in sorted(found.items(), reverse=True)}


def _score_table(by_modality: Mapping[str, np.ndarray]) -> Table:
    names = ("least", *(f"{100 * share:g} %" for share in QUANTILES[1:-1]), "largest")
    quantiles = [np.quantile(values, QUANTILES) for values in by_modality.values()]
    rows = [
        ("units", *(whole(len(values)) for values in by_modality.values())),
        ("of them with score 0", *(whole((values == 0).sum()) for values in by_modality.values())),
        *((name, *(figure(found[place]) for found in quantiles)) for place, name in enumerate(names)),
    ]
    return Table("Quantiles of the scores", ("", *by_modality), rows, f"{SCORES}: values/*, all units of a modality")
