"""The evaluate stage of a run: `quality.json`, the dense, the cut and the slim model on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slimvlm.compress.card import Measured as CardQuality
from slimvlm.compress.card import Recovered, Scored, plain, tell_quality
from slimvlm.compress.data.collate import collator_of
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.data.splits import Measured
from slimvlm.compress.errors import OutputError
from slimvlm.compress.evaluation.evaluate import compare, evaluate, evaluation_batch
from slimvlm.compress.evaluation.quality import COUNTED, FORCED, Comparison, Quality, qualities_of
from slimvlm.compress.evaluation.soundness import check_computes
from slimvlm.compress.files.decoding import content_of, dump, parse, refused_as
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.models.computing import frees_memory, load_to_compute, require_whole
from slimvlm.compress.options import CutOptions, EvaluateOptions
from slimvlm.compress.progress import Progress
from slimvlm.compress.runs import AGAIN, CUT, MODEL, QUALITY, RunFolder


class Evaluated(NamedTuple):
    """Qualities on the same questions: `cut` where a recovery followed, `blind` (dense) where there are two images,
    `rounded` where slim was trained for a variant of the export: with its weights."""

    dense: Quality
    cut: Quality | None
    slim: Quality
    blind: Quality | None
    rounded: Quality | None


@frees_memory
def evaluate_stage(run: RunFolder, options: CutOptions, data: Measured, progress: Progress) -> Evaluated:
    """Quality of the dense, the cut (where a recovery followed) and the slim model, of the dense one blind, and of the
    slim one rounded (where it was trained so)."""
    path = run.path / QUALITY
    if run.finished("evaluate"):
        with refused_as(path, OutputError, AGAIN):
            kept = qualities_of(parse(content_of(path)))
        return Evaluated(kept["dense"], kept.get("cut"), kept["slim"], kept.get("blind"), kept.get("rounded"))
    with run.stage("evaluate") as facts:
        facts.update(samples=len(data.evaluation), held_out=data.held_out)
        cut, slim = (str(run.path / name) for name in (CUT, MODEL))
        recovered = (run.path / CUT).is_dir()
        dense, blind = evaluate_seeing_and_blind(options, options.model, data.evaluation, progress)
        found = Evaluated(
            dense,
            evaluate_model(options, cut, data.evaluation, progress) if recovered else None,
            evaluate_model(options, slim, data.evaluation, progress),
            blind,
            _evaluate_rounded(options, slim, data.evaluation, progress) if recovered and options.recover_as else None,
        )
        document = {name: quality.to_dict() for name, quality in found._asdict().items() if quality is not None}
        document["comparison"] = compare(dense, found.slim, options.seed).to_dict()
        write_text(path, dump(document, indent=1, sort_keys=True) + "\n")
        tell_quality(run.path / MODEL, _recovered(run), _measured(found, options, data))
    return found


def _measured(found: Evaluated, options: CutOptions, data: Measured) -> CardQuality:
    """The figures for the model card."""
    asked = options.eval_data or options.data
    whole = compare(found.dense, found.slim, options.seed)
    tasks = {
        task: compare(found.dense.of_task(task), found.slim.of_task(task), options.seed) for task in found.dense.tasks
    }
    scored = [_scored(task, one) for task, one in tasks.items()]
    return CardQuality(
        data=plain(asked.name),
        held_out=data.held_out,
        images=whole.images,
        metric=COUNTED[found.dense.kind] + (f"; {FORCED}" if found.dense.forced else ""),
        level=whole.level,
        blind=None if found.blind is None else found.blind.score,
        whole=_scored("mean of tasks", whole),
        tasks=tuple(sorted(scored, key=lambda one: one.slim - one.dense)),
    )


def _scored(task: str, found: Comparison) -> Scored:
    return Scored(plain(task), found.questions, found.dense, found.slim, found.low, found.high)


def _recovered(run: RunFolder) -> Recovered | None:
    """The training, unless the weights from before it were kept."""
    facts = run.facts("recover")
    if not run.finished("recover") or not facts["best_step"]:
        return None
    return Recovered(facts["options"]["recover"], facts["options"]["train"], facts["steps"], facts["samples"])


def evaluate_seeing_and_blind(
    options: EvaluateOptions, name: str, samples: Sequence[Sample], progress: Progress, form: str | None = None
) -> tuple[Quality, Quality | None]:
    """Quality of the checkpoint `name` on `samples`, and with the images shuffled among them: what needs no image.

    None where all samples show one image; `form` is as of `load_model`.
    """
    seeing, *blind = _qualities(options, name, samples, progress, (None, options.seed), form)
    return seeing, blind[0] if blind else None


def evaluate_model(
    options: EvaluateOptions, name: str, samples: Sequence[Sample], progress: Progress, form: str | None = None
) -> Quality:
    """Quality of the checkpoint `name` on `samples`; `form` is as of `load_model`."""
    return _qualities(options, name, samples, progress, (None,), form)[0]


def _evaluate_rounded(options: CutOptions, name: str, samples: Sequence[Sample], progress: Progress) -> Quality:
    """Quality of the checkpoint `name` with the weights of the variant it was trained for; activations are whole."""
    from slimvlm.compress.recovery.adapters.rounding import rounded  # peft takes seconds to import

    loaded = load_to_compute(options, name)
    size = evaluation_batch(loaded.model.device, options.batch_size)
    with rounded(loaded.model, options.recover_as):
        return evaluate(loaded.model, collator_of(loaded), samples, batch_size=size, progress=progress)


def _qualities(
    options: EvaluateOptions,
    name: str,
    samples: Sequence[Sample],
    progress: Progress,
    seeds: Sequence[int | None],
    form: str | None,
) -> list[Quality]:
    """One evaluation per seed of `evaluate`, with the model loaded once."""
    by_block = options.stream == "on" and form is None
    if form is None and not by_block:
        require_whole(options, name, "an evaluation with answers (--stream on: with forced ones)")
    loaded = load_to_compute(options, name, form=form, beside=0.0 if by_block else None)
    collator = collator_of(loaded)
    check_computes(loaded.model, collator, samples[0], name)
    alone = len({sample.image_key for sample in samples}) < 2
    return [
        evaluate(
            loaded.model,
            collator,
            samples,
            batch_size=evaluation_batch(loaded.model.device, options.batch_size),
            progress=progress,
            blind_seed=seed,
        )
        for seed in seeds
        if seed is None or not alone
    ]
