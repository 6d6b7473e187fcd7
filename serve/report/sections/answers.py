"""A handful of evaluated images, with what the dense and the slim model answered, side by side."""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL import Image

from slimvlm.compress.data.samples import Sample, open_image
from slimvlm.compress.data.splits import read_evaluation, read_measured
from slimvlm.compress.errors import SlimvlmError
from slimvlm.compress.evaluation.quality import Quality, Row, exact_match
from slimvlm.compress.run_record import options_of
from slimvlm.compress.runs import QUALITY
from slimvlm.serve.report.document import Example, Said, Table, percent, shown, whole
from slimvlm.serve.report.files import Qualities, RunFiles
from slimvlm.serve.report.sections.quality import outcomes, right

SHOWN = {(True, False): 3, (False, True): 1, (False, False): 2, (True, True): 2}  # (dense, slim) right -> examples
NAMES = {
    (True, True): "both right",
    (True, False): "only dense right",
    (False, True): "only slim right",
    (False, False): "both wrong",
}
SIDE = 240  # pixels of an image's longer side


class _ChangedError(Exception):
    """The samples are not those that were evaluated."""


def answers_section(files: RunFiles) -> Iterator[Said]:
    """Counts of who was right, and examples of each case."""
    if files.quality is None:
        yield "Nothing was evaluated."
        return
    dense, slim = (files.quality.models[name] for name in ("dense", "slim"))
    cases = outcomes(dense, slim)
    rows = [(NAMES[case], whole(len(places)), percent(len(places) / len(dense.rows))) for case, places in cases.items()]
    yield Table("Who was right", ("", "questions", "share"), rows, f"{QUALITY}: rows of dense and slim")
    try:
        samples = _evaluated(files, files.quality)
        examples = [_example(files.quality, place, samples) for place in _chosen(dense, cases, files)]
    except (SlimvlmError, _ChangedError, OSError) as error:
        yield f"No images are shown: the evaluated samples cannot be read again ({shown(error)})."
        return
    yield (
        "The examples are drawn by the run's seed, from each of the four cases apart and from as many tasks and images "
        "as possible, so they show what happens, not how often: the table has the counts."
    )
    yield from examples


def _chosen(dense: Quality, cases: dict[tuple[bool, bool], list[int]], files: RunFiles) -> list[int]:
    """Places of rows, tasks and images that are not shown yet first."""
    generator = random.Random(files.record["options"]["seed"])
    chosen: list[int] = []
    seen: Counter[str] = Counter()
    for case, count in SHOWN.items():
        places = list(cases[case])
        generator.shuffle(places)
        for _ in range(min(count, len(places))):
            place = min(places, key=lambda one: seen[dense.rows[one].task])
            places.remove(place)
            chosen.append(place)
            seen[dense.rows[place].task] += 1
    return chosen


def _evaluated(files: RunFiles, measured: Qualities) -> dict[str, tuple[Sample, int]]:
    """Identity of a row -> its sample and the number of the turn it asks, checked against what was recorded."""
    options = options_of(files.folder, files.record)
    if options.eval_data:
        samples: Sequence[Sample] = read_evaluation(replace(options, data=options.eval_data))
    else:
        samples = read_measured(options).evaluation
    found = {
        sample.identity if count == 1 else f"{sample.identity}#{count}": (sample, count)
        for sample in samples
        for count in range(1, len(sample.turns) + 1)
    }
    for row in measured.models["dense"].rows:
        if row.identity not in found:
            raise _ChangedError(f"{row.identity} is not among them any more")
        if row.exact is not None and exact_match(row.prediction or "", _answers(found[row.identity])) != row.exact:
            raise _ChangedError(f"{row.identity} has another answer now")
    return found


def _answers(found: tuple[Sample, int]) -> tuple[str, ...]:
    sample, count = found
    return sample.turns[count - 1].answers


def _example(measured: Qualities, place: int, samples: dict[str, tuple[Sample, int]]) -> Example:
    dense = measured.models["dense"].rows[place]
    sample, count = samples[dense.identity]
    return Example(
        image=_data_uri(open_image(sample)),
        name=dense.identity,
        task=dense.task,
        question=shown(" / ".join(turn.prompt for turn in sample.turns[:count])) or "(a caption)",
        wanted=shown(" or ".join(dict.fromkeys(_answers((sample, count))))),
        said={
            name: (_said(quality.rows[place]), right(quality.rows[place], quality.kind) >= 1)
            for name, quality in measured.models.items()
        },
    )


def _said(row: Row) -> str:
    if row.prediction is not None:
        return shown(row.prediction) or "(nothing)"
    return f"right text at rank {row.image_to_text}, right image at rank {row.text_to_image}"


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
