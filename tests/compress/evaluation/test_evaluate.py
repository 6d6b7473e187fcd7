from pathlib import Path

import pytest
import torch
from outputs import MARGIN, sure_tokens
from tiny_models import FACTORIES, tiny_model
from tiny_processors import tiny_image, tiny_processor

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.errors import SampleError
from slimvlm.compress.evaluation.evaluate import _ranks, evaluate, shuffle_images
from slimvlm.compress.evaluation.quality import exact_match
from slimvlm.compress.models.families import find_family

DUAL = ("clip", "siglip")
GENERATIVE = tuple(name for name in FACTORIES if name not in DUAL)
TURNS = (
    ("what is on the left ?", "a red fox", "what"),
    ("how many ?", "two", "count"),
    ("describe", "a small blue house and a tree", "free"),
    ("how many ?", "three", "count"),
    ("what ?", "cat", "what"),
)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    made = []
    for index, (question, answer, task) in enumerate(TURNS):
        path = tmp_path / f"{index % 4}.png"
        tiny_image(seed=index % 4).save(path)
        made.append(Sample(path, (Turn(question, (answer,)),), f"set:{index}", task, "noto" if index < 3 else "fluent"))
    return made


def setup(name: str) -> tuple[torch.nn.Module, Collator]:
    model = tiny_model(name).model
    return model, Collator(tiny_processor(name), find_family(model.config), model.config)


@pytest.mark.parametrize("name", GENERATIVE)
def test_token_loss_is_the_loss_of_the_model_on_the_answer_alone(name: str, samples: list[Sample]) -> None:
    model, collator = setup(name)
    quality = evaluate(model, collator, samples, batch_size=3)
    for row, sample in zip(quality.rows, samples, strict=True):
        with torch.inference_mode():
            alone = model(**collator.training([sample])).loss.item()
        assert row.loss / row.tokens == pytest.approx(alone, abs=2e-4), row.identity
    total = sum(row.loss for row in quality.rows) / sum(row.tokens for row in quality.rows)
    assert quality.scores["token_loss"] == pytest.approx(total)
    assert quality.scores["perplexity"] == pytest.approx(torch.tensor(total).exp().item(), rel=1e-5)


@pytest.mark.parametrize("name", GENERATIVE)
def test_the_prediction_is_what_the_model_generates_for_the_sample_alone(name: str, samples: list[Sample]) -> None:
    model, collator = setup(name)
    said = []
    for sample in samples:
        prompt = collator.prompts([sample])
        ids = sure_tokens(model, prompt, do_sample=False, max_new_tokens=collator.answer_length(sample) + 4)
        keep = 0 if name == "blip2_t5" else prompt["input_ids"].shape[1]
        said.append(collator.decode(ids[:, keep:])[0])
    rows = evaluate(model, collator, samples, batch_size=1).rows
    assert [row.prediction for row in rows] == said
    answers = [sample.turns[0].answers for sample in samples]
    assert [row.exact for row in rows] == [exact_match(text, right) for text, right in zip(said, answers, strict=True)]


def memorized(samples: list[Sample]) -> tuple[torch.nn.Module, Collator]:
    """A tiny model that was taught most of the answers, but not the one to `describe`."""
    model, collator = setup("llava")
    batch = collator.training([sample for sample in samples if sample.task != "free"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model, collator


def test_answers_that_are_sure_are_those_generation_gives(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, collator = memorized(samples)
    seen: list[int] = []
    sure = evaluate(model, collator, samples, batch_size=8, progress=lambda _, done, total: seen.append(done))
    assert seen == [4, 5]  # four without generation, then the one it was not taught
    assert [row.exact for row in sure.rows] == [1.0, 1.0, 0.0, 1.0, 1.0]
    monkeypatch.setattr("slimvlm.compress.evaluation.evaluate.LEAD", float("inf"))
    assert evaluate(model, collator, samples, batch_size=8).rows == sure.rows


def test_generation_is_greedy_whatever_the_model_would_do_by_itself(samples: list[Sample]) -> None:
    model, collator = setup("llava")
    plain = evaluate(model, collator, samples)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=3.0, max_new_tokens=1)
    assert evaluate(model, collator, samples).rows == plain.rows


def test_results_do_not_depend_on_the_batch_size_and_keep_the_order(samples: list[Sample]) -> None:
    model, collator = setup("llava")
    one, many = (evaluate(model, collator, samples, batch_size=size) for size in (1, 5))
    assert [row.identity for row in many.rows] == [sample.identity for sample in samples]
    for first, second in zip(one.rows, many.rows, strict=True):
        assert (first.identity, first.task, first.tokens) == (second.identity, second.task, second.tokens)
        assert first.loss == pytest.approx(second.loss, abs=1e-3)
        shorter = min(len(first.prediction), len(second.prediction))  # a batch may cut later than a sample alone
        assert first.prediction[:shorter] == second.prediction[:shorter]


def test_scores_are_means_of_tasks_and_vendors_are_apart(samples: list[Sample]) -> None:
    model, collator = setup("llava")
    quality = evaluate(model, collator, samples)
    assert {name: task["questions"] for name, task in quality.tasks.items()} == {"count": 2, "free": 1, "what": 2}
    assert {name: vendor["questions"] for name, vendor in quality.vendors.items()} == {"fluent": 2, "noto": 3}
    assert quality.scores["vqa"] == pytest.approx(sum(task["vqa"] for task in quality.tasks.values()) / 3)
    assert quality.score == quality.scores["exact"]


def test_every_turn_of_a_conversation_is_a_question_with_the_turns_before_it_given(samples: list[Sample]) -> None:
    model, collator = setup("llava")
    turns = (Turn("what is it ?", ("a cat",)), Turn("where ?", ("on the right",)))
    chat = Sample(samples[0].image, turns, "chat:0")
    first, second = evaluate(model, collator, [chat]).rows
    assert (first.identity, second.identity) == ("chat:0", "chat:0#2")
    assert (first.tokens, second.tokens) == (3, 4)
    with torch.inference_mode():
        both = model(**collator.training([chat])).loss.item() * 7
    assert first.loss + second.loss == pytest.approx(both, abs=1e-3)


def test_the_model_keeps_its_mode_and_progress_reaches_the_end(samples: list[Sample]) -> None:
    model, collator = setup("llava")
    model.train()
    seen: list[tuple[int, int]] = []
    evaluate(model, collator, samples, batch_size=2, progress=lambda _, done, total: seen.append((done, total)))
    assert model.training
    assert [total for _, total in seen] == [5] * len(seen)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (5, 5)
    with pytest.raises(SampleError):
        evaluate(model, collator, [Sample(samples[0].image, (Turn("red " * 300, ("x",)),), "set:9")])
    assert model.training
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate(model, collator, [])


# ------------------------------------------------------------------ blind


def test_blind_images_are_a_derangement_that_keeps_samples_of_one_image_together(samples: list[Sample]) -> None:
    for seed in range(20):
        shuffled = shuffle_images(samples, seed)
        assert all(new.image != old.image for new, old in zip(shuffled, samples, strict=True))
        assert {sample.image for sample in shuffled} == {sample.image for sample in samples}
        assert shuffled[0].image == shuffled[4].image
        assert [sample.turns for sample in shuffled] == [sample.turns for sample in samples]
    assert shuffle_images(samples, 3) == shuffle_images(samples, 3)
    assert len({tuple(sample.image.name for sample in shuffle_images(samples, seed)) for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="two different images"):
        shuffle_images(samples[:1], 0)


def test_a_blind_evaluation_sees_the_other_images(samples: list[Sample]) -> None:
    model, collator = setup("llava")
    blind = evaluate(model, collator, samples, blind_seed=1)
    seen = evaluate(model, collator, shuffle_images(samples, 1))
    assert blind.blind
    assert not seen.blind
    assert blind.rows == seen.rows
    assert blind.rows != evaluate(model, collator, samples).rows


# ------------------------------------------------------------------ retrieval


@pytest.mark.parametrize("name", DUAL)
def test_dual_encoders_are_ranked_in_both_directions(name: str, samples: list[Sample]) -> None:
    model, collator = setup(name)
    texts = ("red left", "house", "a small blue tree", "cat")  # no two of the same tokens
    pairs = [
        Sample(sample.image, (Turn("", (text,)),), sample.identity)
        for sample, text in zip(samples, texts, strict=False)
    ]
    quality = evaluate(model, collator, pairs, batch_size=3)
    with torch.inference_mode():
        batch = collator.training(pairs)
        batch.pop("return_loss")
        logits = model(**batch).logits_per_image
    for similar in (logits, logits.T):  # batches of 3 and 4 round differently: no place hangs on that
        assert similar.sort(dim=1).values.diff(dim=1).min() > MARGIN
    order = logits.argsort(dim=1, descending=True)
    for index, row in enumerate(quality.rows):
        assert row.image_to_text == order[index].tolist().index(index) + 1
        assert row.text_to_image == logits[:, index].argsort(descending=True).tolist().index(index) + 1
    assert quality.kind == "retrieval"
    assert quality.scores["image_to_text_r5"] == quality.scores["text_to_image_r10"] == 1.0
    directions = (quality.scores[f"{name}_r1"] for name in ("image_to_text", "text_to_image"))
    assert quality.score == pytest.approx(sum(directions) / 2)


def test_every_text_of_an_image_is_right_and_equal_texts_are_one(samples: list[Sample]) -> None:
    model, collator = setup("clip")
    caption = Turn("", ("a red fox",))
    pairs = [Sample(samples[index].image, (caption,), f"set:{index}") for index in range(4)]
    rows = evaluate(model, collator, pairs).rows
    assert [(row.image_to_text, row.text_to_image) for row in rows] == [(1, 1)] * 4


def test_a_tie_with_a_wrong_candidate_is_not_a_hit() -> None:
    similar = torch.tensor([[0.5, 0.5, 0.1], [0.9, 0.2, 0.3], [0.7, 0.8, 0.6]])
    right = torch.tensor([[True, False, False], [True, True, False], [False, False, True]])
    assert _ranks(similar, right) == [2, 1, 3]


def test_rows_of_one_image_say_so(samples: list[Sample]) -> None:
    shared = [samples[0], samples[1], samples[2].showing(samples[0])]
    for name in ("llava", "clip"):
        assert [row.image for row in evaluate(*setup(name), shared).rows] == [0, 1, 0]
