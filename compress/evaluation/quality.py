"""What a model can do: one row per question, means per task, and the paired difference of two models. No torch."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict  # rows of the right kind, whose fields are set; parts of a file, each of its own type

import numpy as np

from slimvlm.compress.files.decoding import decode

SCHEMA = 2
RECALLS = (1, 5, 10)
UNNAMED_TASK = "all"
MOST_RESAMPLES = 10**6
RESAMPLED_AT_ONCE = 2**22
LEVEL, NORMAL_QUANTILE = 0.95, 1.959964  # of intervals; the standard normal's (1 + LEVEL) / 2 quantile
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}
_PUNCTUATION = str.maketrans({mark: " " for mark in string.punctuation if mark != "'"} | {"'": ""})
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[,](?=\d{3})")


def normalize(answer: str) -> str:
    """Lower case without punctuation, articles and extra blanks: `The  Red-fox.` is `red fox`, `1,000` is `1000`."""
    words = _BETWEEN_DIGITS.sub("", answer.lower()).translate(_PUNCTUATION).split()
    return " ".join(word for word in words if word not in ARTICLES)


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 if the normalised prediction is one of the normalised answers, else 0."""
    return float(normalize(prediction) in {normalize(answer) for answer in answers})


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy, 0 to 1: annotators who agree / 3, at most 1; with fewer than 3 answers, / their number.

    Number words count as digits (`two` is `2`), besides what `normalize` does. Antol et al., ICCV 2015.
    """
    said = _vqa_form(prediction)
    agree = sum(said == _vqa_form(answer) for answer in answers)
    return min(agree / min(len(answers), 3), 1.0)


def _vqa_form(answer: str) -> str:
    return " ".join(DIGITS.get(word, word) for word in normalize(answer).split())


@dataclass(frozen=True, slots=True)
class Row:
    """One question (generation) or one image-text pair (retrieval).

    Attributes:
        identity: of the sample; pairs the rows of two models.
        prediction: generated answer.
        exact, vqa: scores of it, 0 to 1.
        loss: summed negative log-likelihood of the answer's tokens, in nats; `tokens`: how many they are.
        image_to_text, text_to_image: rank of the best right text for this image, and the reverse; 1 is best.
        image: number of the image; rows with the same one show the same image. None: shared with no other row.
    """

    identity: str
    task: str
    vendor: str | None
    prediction: str | None = None
    exact: float | None = None
    vqa: float | None = None
    loss: float | None = None
    tokens: int | None = None
    image_to_text: int | None = None
    text_to_image: int | None = None
    image: int | None = None


Metric = Callable[[Any], float]  # of a Row of the right kind: the fields it reads are set


def _rank_metric(direction: str, k: int) -> Metric:
    return lambda row: float(getattr(row, direction) <= k)


GENERATION: dict[str, Metric] = {
    "exact": lambda row: row.exact,
    "vqa": lambda row: row.vqa,
    "token_loss": lambda row: row.loss / row.tokens,
}
RETRIEVAL: dict[str, Metric] = {
    f"{direction}_r{k}": _rank_metric(direction, k) for direction in ("image_to_text", "text_to_image") for k in RECALLS
} | {"mean_r1": lambda row: (float(row.image_to_text <= 1) + float(row.text_to_image <= 1)) / 2}
METRICS = {"generation": GENERATION, "retrieval": RETRIEVAL}
PRIMARY = {"generation": "exact", "retrieval": "mean_r1"}
COUNTED = {  # the figure to quote, in words
    "generation": "the share of answers that equal a right answer (case, articles and punctuation aside)",
    "retrieval": "the share of images and texts whose first match is right, both directions",
}
FORCED = "each token of an answer is given the right ones before it, because the model was read block by block"
LOWER_IS_BETTER = frozenset(("token_loss",))


@dataclass(frozen=True, slots=True)
class Quality:
    """An evaluation.

    Attributes:
        kind: `generation` (answers) or `retrieval` (dual encoders).
        blind: images were shuffled across samples, so only the question could help.
        scores: means of tasks (each task counts the same), 0 to 1; `token_loss` (nats) is the mean over all answer
            tokens, `perplexity` its exponential.
        tasks, vendors: the same per task and per vendor (mean of rows), with `questions`, their number.
        rows: in the order of the samples.
        seconds: wall time of the evaluation.
        forced: an answer is, at every token of the right one, what is most probable there, the right tokens before it
            given. It is the right answer where a generation gives that, up to near ties; a generation may also say
            another right one.
    """

    kind: str
    blind: bool
    scores: Mapping[str, float]
    tasks: Mapping[str, Mapping[str, float]]
    vendors: Mapping[str, Mapping[str, float]]
    rows: tuple[Row, ...]
    seconds: float
    forced: bool = False
    schema: int = SCHEMA

    @staticmethod
    def upgraded(document: Mapping[str, Any]) -> dict[str, Any]:
        """With what earlier versions did not write."""
        return {"forced": False, **document}

    @property
    def score(self) -> float:
        """The figure to quote: exact match, or mean R@1 of both directions; mean of tasks."""
        return self.scores[PRIMARY[self.kind]]

    def of_task(self, task: str) -> Quality:
        """The same, of one task's questions alone."""
        return summarize(self.kind, [row for row in self.rows if row.task == task], blind=self.blind, seconds=0.0)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return asdict(self)


def summarize(kind: str, rows: Sequence[Row], *, blind: bool, seconds: float) -> Quality:
    """Means of rows per task and vendor, and the mean of tasks.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("an evaluation needs at least one sample")
    tasks = {task: _means(kind, group) for task, group in _grouped(rows, lambda row: row.task).items()}
    vendors = {vendor: _means(kind, group) for vendor, group in _grouped(rows, lambda row: row.vendor).items()}
    scores = {name: float(np.mean([task[name] for task in tasks.values()])) for name in METRICS[kind]}
    if kind == "generation":
        scores |= _token_scores(rows)
    return Quality(kind, blind, scores, tasks, vendors, tuple(rows), seconds)


def _grouped(rows: Sequence[Row], key: Callable[[Row], str | None]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if (name := key(row)) is not None:
            groups.setdefault(name, []).append(row)
    return dict(sorted(groups.items()))


def _means(kind: str, rows: Sequence[Row]) -> dict[str, float]:
    means = {name: float(np.mean([metric(row) for row in rows])) for name, metric in METRICS[kind].items()}
    return {"questions": len(rows), **means, **(_token_scores(rows) if kind == "generation" else {})}


def _token_scores(rows: Sequence[Any]) -> dict[str, float]:
    loss = sum(row.loss for row in rows) / sum(row.tokens for row in rows)
    return {"token_loss": loss, "perplexity": math.exp(min(loss, 700.0))}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Slim minus dense on the same questions.

    Attributes:
        metric: what is compared; the mean of tasks of each model is `dense` and `slim`.
        difference: slim - dense; `low` to `high` is its paired bootstrap interval (percentiles) at `level`: `images`
            are drawn with replacement, each with all its questions, because the questions of one image are not apart.
        tasks: difference per task.
    """

    metric: str
    dense: float
    slim: float
    difference: float
    low: float
    high: float
    level: float
    resamples: int
    seed: int
    questions: int
    images: int
    tasks: Mapping[str, float]

    @property
    def drop(self) -> float:
        """How much worse slim is; negative if it is better."""
        return self.difference if self.metric in LOWER_IS_BETTER else -self.difference

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return asdict(self)


class QualityFile(TypedDict):
    """`quality.json` of a run."""

    dense: Quality
    slim: Quality
    comparison: Comparison


class QualityFileOfRun(QualityFile, total=False):
    """With what some runs have: the cut model before its recovery, the dense one blind, and the slim one with weights
    rounded as those of the variant it was trained for."""

    cut: Quality
    blind: Quality
    rounded: Quality


def qualities_of(document: object) -> dict[str, Any]:
    """What `quality.json` holds, if its parts fit each other.

    Raises:
        ValueError: the field that does not fit.
    """
    found: dict[str, Any] = dict(decode(document, QualityFileOfRun))
    models = {name: quality for name, quality in found.items() if isinstance(quality, Quality)}
    for name, quality in models.items():
        if [(row.identity, row.task) for row in quality.rows] != [
            (row.identity, row.task) for row in found["dense"].rows
        ]:
            raise ValueError(f"{name}.rows: they are not the questions of dense.rows")
        if quality.kind != found["dense"].kind or quality.kind not in METRICS:
            raise ValueError(f"{name}.kind: {quality.kind!r} is none, or not that of dense")
        try:
            again = summarize(quality.kind, quality.rows, blind=quality.blind, seconds=quality.seconds)
        except (ValueError, TypeError, ArithmeticError):
            raise ValueError(f"{name}.rows: they lack what {quality.kind} is scored by") from None
        for part in ("scores", "tasks", "vendors"):
            if _names(getattr(quality, part)) != _names(getattr(again, part)):
                raise ValueError(f"{name}.{part}: it does not follow from the rows")
    comparison: Comparison = found["comparison"]
    if comparison.metric not in METRICS[found["dense"].kind]:
        raise ValueError(f"comparison.metric: {comparison.metric!r} is not one of this kind")
    if not (0 < comparison.level < 1 and 0 < comparison.resamples <= MOST_RESAMPLES and comparison.seed >= 0):
        raise ValueError("comparison: its level, resamples or seed is out of range")
    return found


def _names(values: Mapping[str, object]) -> dict[str, object]:
    return {name: _names(value) if isinstance(value, Mapping) else None for name, value in values.items()}


def compare(
    dense: Quality,
    slim: Quality,
    seed: int = 0,
    *,
    metric: str | None = None,
    resamples: int = 2000,
    level: float = 0.95,
) -> Comparison:
    """Paired bootstrap of the difference of the mean of tasks, over images: each is drawn with all its questions.

    A task's mean is a ratio (of what a draw's questions give to how many they are); its deviations are taken to first
    order, so that a draw without any question of a task counts too. With a single image questions are drawn.

    Args:
        metric: by default the figure to quote of this kind; see METRICS.

    Raises:
        ValueError: the two are of different kinds or questions, or the metric is unknown.
    """
    if dense.kind != slim.kind or [row.identity for row in dense.rows] != [row.identity for row in slim.rows]:
        raise ValueError("the two qualities were not measured on the same questions; evaluate both on one sample set")
    metric = metric or PRIMARY[dense.kind]
    if metric not in METRICS[dense.kind]:
        raise ValueError(f"metric is {metric!r}; accepted is one of {', '.join(METRICS[dense.kind])}")
    value = METRICS[dense.kind][metric]
    before, after = (np.array([value(row) for row in quality.rows]) for quality in (dense, slim))
    labels = np.array([row.task for row in dense.rows])
    members = {str(task): np.flatnonzero(labels == task) for task in np.unique(labels)}
    tasks = {task: float((after - before)[index].mean()) for task, index in members.items()}
    generator = np.random.default_rng(seed)
    sides = [float(np.mean([side[index].mean() for index in members.values()])) for side in (before, after)]
    difference = float(np.mean(list(tasks.values())))
    shares = np.zeros(len(labels))  # of each question in how far the mean of tasks is off
    for task, index in members.items():
        shares[index] = ((after - before)[index] - tasks[task]) / (len(index) * len(members))
    images = image_numbers(dense.rows)
    summed = np.bincount(images, shares) if images.max() > 0 else shares
    means = difference + len(summed) * _resampled_means(summed, resamples, generator)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Comparison(
        metric=metric,
        dense=sides[0],
        slim=sides[1],
        difference=difference,
        low=float(low),
        high=float(high),
        level=level,
        resamples=resamples,
        seed=seed,
        questions=len(dense.rows),
        images=int(images.max()) + 1,
        tasks=tasks,
    )


def wilson(mean: float, count: float) -> tuple[float, float]:
    """Wilson's score interval (1927) at LEVEL of a mean of zeros and ones; for values between them it is too wide.

    Args:
        count: how many independent values the mean is of, or worth.
    """
    z = NORMAL_QUANTILE
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    arm = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, min(mean, centre - arm)), min(1.0, max(mean, centre + arm))


def untold(dense: Quality, blind: Quality | None, slim: Quality | None = None, seed: int = 0) -> tuple[str, ...]:
    """The tasks that tell nothing of a cut: the dense model is not measurably better there than without its image, nor
    measurably other than the slim one.

    Args:
        blind: the dense model with images shuffled, on the same questions; None: nothing is known.
    """
    return () if blind is None else tuple(task for task in dense.tasks if not _tells(task, dense, blind, slim, seed))


def _tells(task: str, dense: Quality, blind: Quality, slim: Quality | None, seed: int) -> bool:
    asked = dense.of_task(task)
    if compare(blind.of_task(task), asked, seed).low > 0:
        return True
    change = None if slim is None else compare(asked, slim.of_task(task), seed)
    return change is not None and (change.low > 0 or change.high < 0)


def image_numbers(rows: Sequence[Row]) -> np.ndarray:
    """int64 [rows], from 0 without a gap: which image each row shows; a row that names none has one of its own."""
    names = [f"row {place}" if row.image is None else f"image {row.image}" for place, row in enumerate(rows)]
    return np.unique(names, return_inverse=True)[1]


def _resampled_means(values: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """f64[resamples], in blocks of bounded memory."""
    block = max(1, RESAMPLED_AT_ONCE // len(values))
    means = []
    for start in range(0, resamples, block):
        draws = generator.integers(len(values), size=(min(block, resamples - start), len(values)))
        means.append(values[draws].mean(axis=1))
    return np.concatenate(means)
