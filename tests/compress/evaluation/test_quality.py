import json

import numpy as np
import pytest

from slimvlm.compress.evaluation.quality import (
    Comparison,
    Quality,
    Row,
    compare,
    exact_match,
    normalize,
    summarize,
    untold,
    vqa_accuracy,
)
from slimvlm.compress.files.decoding import decode


def rows_of(scores: dict[str, list[float]], vendor: str | None = None) -> list[Row]:
    return [
        Row(f"{task}:{index}", task, vendor, "x", score, score, 2.0 * (index + 1), index + 1)
        for task, values in scores.items()
        for index, score in enumerate(values)
    ]


def quality_of(scores: dict[str, list[float]]) -> Quality:
    return summarize("generation", rows_of(scores), blind=False, seconds=1.5)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Red-fox.", "red fox"),
        ("  a\tcat!\n", "cat"),
        ("An apple, a day", "apple day"),
        ("1,000", "1000"),
        ("1, 2", "1 2"),
        ("it's", "its"),
        ("theatre", "theatre"),
        ("ÉTÉ", "été"),
        ("the", ""),
    ],
)
def test_answers_are_compared_without_case_punctuation_articles_and_blanks(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


def test_exact_match_takes_any_of_the_answers() -> None:
    assert exact_match("A fox.", ["cat", "the fox"]) == 1.0
    assert exact_match("red fox", ["fox"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers", "accuracy"),
    [
        ("fox", ["fox"], 1.0),
        ("fox", ["fox", "cat"], 0.5),
        ("fox", ["fox", "cat", "dog"], 1 / 3),
        ("fox", ["fox"] * 2 + ["cat"] * 8, 2 / 3),
        ("fox", ["The fox."] * 3 + ["cat"] * 7, 1.0),
        ("fox", ["fox"] * 10, 1.0),
        ("cat", ["fox"] * 10, 0.0),
        ("2", ["two"], 1.0),
        ("none", ["0"], 1.0),
    ],
)
def test_vqa_accuracy_is_the_share_of_three_annotators(prediction: str, answers: list[str], accuracy: float) -> None:
    assert vqa_accuracy(prediction, answers) == pytest.approx(accuracy)


def test_each_task_counts_the_same_and_the_loss_is_per_token() -> None:
    quality = quality_of({"count": [1, 1, 1, 0], "where": [0]})
    assert quality.scores["exact"] == pytest.approx((0.75 + 0) / 2)
    assert quality.scores["token_loss"] == pytest.approx(2.0)
    assert quality.scores["perplexity"] == pytest.approx(np.e**2)
    assert quality.tasks["count"]["exact"] == 0.75
    assert quality.vendors == {}
    with pytest.raises(ValueError, match="at least one sample"):
        summarize("generation", [], blind=False, seconds=0.0)


def test_a_quality_survives_json() -> None:
    quality = quality_of({"count": [1, 0], "where": [0.5]})
    assert decode(json.loads(json.dumps(quality.to_dict())), Quality) == quality
    ranks = [Row("set:0", "all", None, image_to_text=1, text_to_image=7, image=0)]
    retrieval = summarize("retrieval", ranks, blind=False, seconds=0.0)
    assert decode(json.loads(json.dumps(retrieval.to_dict())), Quality) == retrieval
    assert retrieval.scores["text_to_image_r5"] == 0.0
    assert retrieval.scores["text_to_image_r10"] == 1.0


@pytest.mark.parametrize("where", ["quality", "row"])
def test_unknown_and_missing_keys_are_errors_that_name_the_key(where: str) -> None:
    def document() -> tuple[dict, dict]:
        whole = quality_of({"count": [1]}).to_dict()
        return whole, whole if where == "quality" else whole["rows"][0]

    whole, part = document()
    part["colour"] = 1
    with pytest.raises(ValueError, match="unknown key 'colour'"):
        decode(whole, Quality)
    whole, part = document()
    first = sorted(part)[0]
    del part[first]
    with pytest.raises(ValueError, match=f"key '{first}' is missing"):
        decode(whole, Quality)
    with pytest.raises(ValueError, match="schema 99"):
        decode({**quality_of({"count": [1]}).to_dict(), "schema": 99}, Quality)


# ------------------------------------------------------------------ comparison


def test_a_model_compared_with_itself_differs_by_nothing() -> None:
    quality = quality_of({"count": [1, 0, 1], "where": [0, 1]})
    same = compare(quality, quality)
    assert (same.difference, same.low, same.high, same.drop) == (0.0, 0.0, 0.0, 0.0)


def test_the_difference_is_that_of_the_means_of_tasks() -> None:
    dense, slim = quality_of({"a": [1, 1, 1, 1], "b": [1, 0]}), quality_of({"a": [1, 0, 1, 1], "b": [0, 0]})
    result = compare(dense, slim, seed=5)
    assert (result.dense, result.slim) == (0.75, 0.375)
    assert result.difference == pytest.approx(-0.375)
    assert result.drop == pytest.approx(0.375)
    assert result.tasks == {"a": -0.25, "b": -0.5}
    assert result.low <= result.difference <= result.high
    assert result.questions == 6


def test_the_interval_is_the_normal_one_where_questions_are_many() -> None:
    generator = np.random.default_rng(0)
    before, after = generator.integers(0, 2, (2, 4000)).astype(float)
    result = compare(quality_of({"a": list(before)}), quality_of({"a": list(after)}), resamples=4000)
    half = 1.96 * (after - before).std() / np.sqrt(4000)
    assert result.low == pytest.approx((after - before).mean() - half, abs=half / 10)
    assert result.high == pytest.approx((after - before).mean() + half, abs=half / 10)


def test_tasks_are_resampled_apart_so_a_constant_task_adds_no_spread() -> None:
    dense = quality_of({"steady": [1] * 50, "shaky": [1, 0] * 25})
    slim = quality_of({"steady": [0] * 50, "shaky": [0, 1] * 25})
    alone = compare(quality_of({"shaky": [1, 0] * 25}), quality_of({"shaky": [0, 1] * 25}), seed=1)
    both = compare(dense, slim, seed=1)
    assert both.high - both.low == pytest.approx((alone.high - alone.low) / 2, rel=0.1)
    assert both.difference == pytest.approx(-0.5)


def clustered(changes: np.ndarray, tasks: int, images: int, shared: bool) -> tuple[Quality, Quality]:
    """Every image is asked one question of every task; `changes` [images, tasks] of the answers, 0 or -1."""
    sides = []
    for right in (np.ones_like(changes), 1 + changes):
        rows = [
            Row(
                f"{image}:{task}", f"task {task}", None, "x", right[image, task], right[image, task], 1.0, 1,
                image=image if shared else None,
            )
            for image in range(images) for task in range(tasks)
        ]  # fmt: skip
        sides.append(summarize("generation", rows, blind=False, seconds=0.0))
    return sides[0], sides[1]


def test_questions_of_one_image_are_drawn_together_so_the_interval_is_wider() -> None:
    lost = -(np.random.default_rng(3).random((300, 1)) < 0.3).astype(float)
    changes = np.repeat(lost, 7, axis=1)  # an image that is not understood loses all its answers
    together, apart = (compare(*clustered(changes, 7, 300, shared)) for shared in (True, False))
    widths = [one.high - one.low for one in (together, apart)]
    assert widths[0] / widths[1] == pytest.approx(7**0.5, rel=0.1)
    assert widths[0] == pytest.approx(2 * 1.96 * lost.std() / 300**0.5, rel=0.1)
    assert (together.images, apart.images, together.questions) == (300, 2100, 2100)
    assert together.difference == apart.difference


def test_the_interval_is_that_of_the_literal_bootstrap_where_images_have_different_questions() -> None:
    generator = np.random.default_rng(4)
    asked = generator.random((200, 3)) < 0.6
    changes = -((generator.random((200, 1)) < 0.3) & (generator.random((200, 3)) < 0.8)).astype(float)
    dense, slim = clustered(changes, 3, 200, shared=True)
    chosen = np.flatnonzero(asked.flatten())
    some = [
        summarize("generation", [side.rows[place] for place in chosen], blind=False, seconds=0.0)
        for side in (dense, slim)
    ]
    found = compare(*some, resamples=8000)
    weights = generator.multinomial(200, np.full(200, 1 / 200), size=8000)
    means = ((weights @ (changes * asked)) / (weights @ asked)).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_a_single_image_does_not_make_a_difference_certain() -> None:
    changes = -np.array([[1.0, 0.0, 1.0, 0.0]])
    found = compare(*(summarize("generation", [
        Row(str(index), "a", None, "x", right, right, 1.0, 1, image=0) for index, right in enumerate(side)
    ], blind=False, seconds=0.0) for side in (np.ones(4), 1 + changes[0])))  # fmt: skip
    assert found.low < found.difference < found.high


def test_the_pairing_makes_the_interval_narrower_than_two_independent_ones() -> None:
    scores = list(np.random.default_rng(1).integers(0, 2, 400).astype(float))
    worse = [0.0 if index < 8 else score for index, score in enumerate(scores)]
    result = compare(quality_of({"a": scores}), quality_of({"a": worse}))
    assert result.high - result.low < 0.03


def test_the_interval_follows_from_the_seed_and_survives_json() -> None:
    dense, slim = quality_of({"a": [1, 0, 1, 1, 0, 1]}), quality_of({"a": [0, 0, 1, 1, 1, 0]})
    assert compare(dense, slim, seed=2) == compare(dense, slim, seed=2)
    result = compare(dense, slim, seed=2, metric="token_loss")
    assert decode(json.loads(json.dumps(result.to_dict())), Comparison) == result


def test_a_task_tells_nothing_where_the_dense_model_is_no_better_with_its_image() -> None:
    dense = quality_of({"seen": [1.0] * 40, "guessed": [1.0, 0.0] * 20, "unable": [0.0] * 40})
    blind = quality_of({"seen": [0.0] * 40, "guessed": [0.0, 1.0] * 20, "unable": [0.0] * 40})
    assert untold(dense, blind) == ("guessed", "unable")
    assert untold(dense, None) == ()
    worse = quality_of({"seen": [0.0] * 40, "guessed": [0.0] * 40, "unable": [0.0] * 40})
    assert untold(dense, blind, worse) == ("unable",)  # that guesses are lost is told


def test_more_loss_is_a_drop() -> None:
    dense = summarize("generation", [Row("1", "a", None, "x", 1.0, 1.0, 2.0, 2)], blind=False, seconds=0.0)
    slim = summarize("generation", [Row("1", "a", None, "x", 1.0, 1.0, 3.0, 2)], blind=False, seconds=0.0)
    assert compare(dense, slim, metric="token_loss").drop == pytest.approx(0.5)


def test_different_questions_or_an_unknown_metric_are_refused() -> None:
    quality = quality_of({"a": [1, 0]})
    with pytest.raises(ValueError, match="same questions"):
        compare(quality, quality_of({"a": [1]}))
    with pytest.raises(ValueError, match="metric is 'bleu'; accepted is one of exact, vqa, token_loss"):
        compare(quality, quality, metric="bleu")
