"""Evaluate a model on samples: greedy answers and token loss, or retrieval for dual encoders."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol  # Any: a model that generates, which transformers' types do not say

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

from slimvlm.compress.data.collate import IGNORED, Batch, Collator
from slimvlm.compress.data.questions import ask, placed, pose
from slimvlm.compress.data.samples import Sample, batches
from slimvlm.compress.errors import foreign
from slimvlm.compress.evaluation.quality import (
    UNNAMED_TASK,
    Comparison,
    Quality,
    Row,
    compare,
    exact_match,
    summarize,
    vqa_accuracy,
)
from slimvlm.compress.models.computing import undisturbed
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.streaming.forwards import Result, through_blocks

__all__ = ["Comparison", "Quality", "Row", "compare", "evaluate", "shuffle_images"]

ALL = 2**31  # questions: of a streamed model they are no batch
WIDENED = 64 * 2**20  # bytes of logits that are looked at in fp32 at once
FORWARD_ON_GPU = 4  # times the samples of a calibration batch, where nothing is kept for a backward pass
MARGIN = 4  # tokens a generated answer may be longer than the longest right one, before it is cut
LEAD, HALF_LEAD = 1e-2, 0.5  # of a logit over the runner-up that batching and caching cannot turn over: fp32, half
GREEDY = {  # said in full: what is left out is filled in from the generation settings of the model
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}


def evaluate(
    model: PreTrainedModel,
    collator: Collator,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    progress: Progress = silent,
    blind_seed: int | None = None,
) -> Quality:
    """Quality of a model of transformers; see `measure_quality`. Of one that is streamed all questions go through a
    block together, and answers are forced: see `Quality`.
    """
    with _inference(model):
        measure = partial(measure_quality, samples=samples, progress=progress, blind_seed=blind_seed)
        if not streamed(model):
            return measure(_Model(model, collator), batch_size=batch_size)
        found = measure(_Streamed(model, collator, batch_size), batch_size=ALL)
        return replace(found, forced=found.kind == "generation")


def measure_quality(
    answering: Answering,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    progress: Progress = silent,
    blind_seed: int | None = None,
) -> Quality:
    """Answer every question greedily and take the loss of its right answer; a dual encoder ranks texts and images.

    In a sample of several turns each turn is a question, with the turns before it given.

    Args:
        progress: called with ("evaluate", questions done, all questions) after each batch.
        blind_seed: shuffle the images across samples first, by this seed: what is left needs no image.

    Raises:
        SampleError: a text is longer than the model can take.
        ValueError: no samples, or only one image where images are to be shuffled.
    """
    if not samples:
        raise ValueError("an evaluation needs at least one sample")
    started = time.perf_counter()
    if blind_seed is not None:
        samples = shuffle_images(samples, blind_seed)
    is_dual = answering.collator.family.contrastive
    run = _Evaluation(answering, batch_size, progress)
    rows = _retrieve(run, samples) if is_dual else _answer(run, _questions(samples))
    kind = "retrieval" if is_dual else "generation"
    return summarize(kind, rows, blind=blind_seed is not None, seconds=time.perf_counter() - started)


def evaluation_batch(device: torch.device, wanted: int) -> int:
    """Questions of an evaluation batch, from the samples `wanted` in a calibration batch."""
    return wanted * (FORWARD_ON_GPU if device.type == "cuda" else 1)


def shuffle_images(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The samples with images exchanged: every image is replaced, always by the same other one (a derangement).

    Raises:
        ValueError: fewer than two different images.
    """
    images = {sample.image_key: sample for sample in samples}
    if len(images) < 2:
        raise ValueError("a blind evaluation needs samples with at least two different images")
    order = list(images)
    random.Random(seed).shuffle(order)
    other = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle through all: nothing stays
    return [sample.showing(images[other[sample.image_key]]) for sample in samples]


def greedy(model: PreTrainedModel, collator: Collator, max_new_tokens: int) -> GenerationConfig:
    """What `generate` needs to give the most probable tokens and to end as the tokenizer and the model say."""
    end = end_ids(model, collator)
    return GenerationConfig(
        **GREEDY, max_new_tokens=max_new_tokens, eos_token_id=list(end), pad_token_id=pad_id(model, collator)
    )


def generate(model: PreTrainedModel, collator: Collator, prompts: Batch, most: int) -> torch.Tensor:
    """Ids of the greedy answers, `most` tokens each at most; behind the prompt where the model repeats that."""
    mixed: Any = model  # transformers does not say in the type of a model that it generates
    ids: torch.Tensor = mixed.generate(**prompts, generation_config=greedy(model, collator, most))
    return ids


def end_ids(model: PreTrainedModel, collator: Collator) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's own, then those of the model's generation settings."""
    given = getattr(model.generation_config, "eos_token_id", None)
    given = given if isinstance(given, list) else [given]
    return tuple(dict.fromkeys(token for token in (collator.tokenizer.eos_token_id, *given) if token is not None))


def pad_id(model: PreTrainedModel, collator: Collator) -> int:
    """What generation fills a finished row with."""
    pad = collator.tokenizer.pad_token_id
    return end_ids(model, collator)[0] if pad is None else pad


@dataclass(frozen=True, slots=True)
class Taught:
    """Summed loss in nats and number of the right answer's tokens; `answer` if greedy generation is sure to give it."""

    loss: float
    tokens: int
    answer: str | None


class Answering(Protocol):
    """What is evaluated: a model of transformers, or graphs. A dual encoder embeds, all others teach and answer."""

    @property
    def collator(self) -> Collator:
        """Makes its batches."""

    def teach(self, questions: Sequence[Sample]) -> list[Taught]:
        """What it makes of the right answers, each given to it."""

    def answer(self, questions: Sequence[Sample]) -> list[str]:
        """The greedy answers."""

    def embed(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the images and of the texts, fp32 [B, C] each."""


@dataclass(frozen=True, slots=True)
class _Evaluation:
    answering: Answering
    batch_size: int
    progress: Progress

    def report(self, done: int, total: int) -> None:
        self.progress("evaluate", done, total)


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Inference mode, evaluation behaviour; the model's own modes come back."""
    # FSDP keeps the buffers it gathers weights in for the next training step, which cannot use inference tensors.
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    with undisturbed(model), torch.no_grad() if sharded else torch.inference_mode():
        yield


def _questions(samples: Sequence[Sample]) -> list[Sample]:
    return [
        replace(
            sample, turns=sample.turns[:count], identity=f"{sample.identity}#{count}" if count > 1 else sample.identity
        )
        for sample in samples
        for count in range(1, len(sample.turns) + 1)
    ]


def _answer(run: _Evaluation, questions: Sequence[Sample]) -> list[Row]:
    """Batches of similar length, so that little is padding and no short answer waits for a long one.

    Where every token of the right answer is the most probable one by far, greedy generation must give that answer, so
    only the other questions are generated.
    """

    def length(index: int) -> tuple[int, int]:
        turn = questions[index].turns[-1]
        return len(turn.target.split()), sum(len(turn.prompt) + len(turn.target) for turn in questions[index].turns)

    order = sorted(range(len(questions)), key=length)
    taught: dict[int, Taught] = {}
    answers: dict[int, str] = {}
    for start in range(0, len(order), run.batch_size):
        chosen = order[start : start + run.batch_size]
        taught.update(zip(chosen, run.answering.teach([questions[index] for index in chosen]), strict=True))
        answers.update((index, sure) for index in chosen if (sure := taught[index].answer) is not None)
        run.report(len(answers), len(order))
    open_ones = [index for index in order if index not in answers]
    for start in range(0, len(open_ones), run.batch_size):
        chosen = open_ones[start : start + run.batch_size]
        answers.update(zip(chosen, run.answering.answer([questions[index] for index in chosen]), strict=True))
        run.report(len(answers), len(order))
    images = _numbered([question.image_key for question in questions])
    return [_row(question, answers[index], taught[index], images[index]) for index, question in enumerate(questions)]


def _row(question: Sample, prediction: str, taught: Taught, image: int) -> Row:
    answers = question.turns[-1].answers
    return Row(
        question.identity,
        question.task or UNNAMED_TASK,
        question.vendor,
        prediction,
        exact_match(prediction, answers),
        vqa_accuracy(prediction, answers),
        taught.loss,
        taught.tokens,
        image=image,
    )


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of transformers; see `Answering`."""

    model: PreTrainedModel
    collator: Collator

    def teach(self, questions: Sequence[Sample]) -> list[Taught]:
        """One forward with the right answers given; logits only where they are needed."""
        given = self.collator.training(questions, last_turn=True)
        question = ask(self.model, self.collator.family, given)
        assert question is not None and question.labels is not None  # every answer has a token, its end
        logits, targets = question.chosen(self.model(**question.inputs).logits), question.labels
        alike = asked_alike(self.collator, questions, given).to(self.model.device)
        step = max(1, WIDENED // (4 * logits[0].numel()))
        return [
            taught
            for start in range(0, len(questions), step)
            for taught in self._judge(*(rows[start : start + step] for rows in (logits, targets, alike)))
        ]

    def _judge(self, logits: torch.Tensor, targets: torch.Tensor, alike: torch.Tensor) -> list[Taught]:
        """What the logits [B, L, V] say of the targets [B, L]; `alike` [B]: whether generation starts from the same."""
        logits = logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)
        counts = (targets != IGNORED).sum(1)
        sure = (_first_by_far(logits, targets, self.model.dtype) & alike).tolist()
        end = end_ids(self.model, self.collator)[0]
        texts = self.collator.decode(targets.masked_fill(targets == IGNORED, end)) if any(sure) else []
        return [
            Taught(loss, count, texts[place] if sure[place] else None)
            for place, (loss, count) in enumerate(zip(losses.tolist(), counts.tolist(), strict=True))
        ]

    def answer(self, questions: Sequence[Sample]) -> list[str]:
        """By `generate`."""
        inputs = placed(self.collator.prompts(questions), self.model.device, self.model.dtype)
        with foreign("the model cannot answer", "check its config.json and generation_config.json"):
            ids = generate(self.model, self.collator, inputs, longest_answer(self.collator, questions))
        prompt = inputs["input_ids"]
        if ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
            ids = ids[:, prompt.shape[1] :]
        return self.collator.decode(ids)

    def embed(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one forward."""
        posed = pose(self.model, self.collator.family, self.collator.training(samples))
        output = self.model(**placed(posed.inputs, self.model.device, self.model.dtype))
        return output.image_embeds.float(), output.text_embeds.float()


@dataclass(frozen=True, slots=True)
class _Streamed(_Model):
    """A model whose blocks are read when they are needed, which a generation would do for every token; see `Answering`.
    Batches of `size` samples go through it together.
    """

    size: int

    def teach(self, questions: Sequence[Sample]) -> list[Taught]:
        """The answers are forced."""
        return [one for found in self._all(partial(_Model.teach, self), questions) for one in found]

    def _judge(self, logits: torch.Tensor, targets: torch.Tensor, alike: torch.Tensor) -> list[Taught]:
        judged = _Model._judge(self, logits, targets, alike)
        ends = torch.tensor(end_ids(self.model, self.collator), device=logits.device)
        said, asked = logits.argmax(-1), targets != IGNORED  # answers begin later where questions are longer
        over = (torch.isin(said, ends) & asked).cumsum(1) > 0
        texts = self.collator.decode(said.masked_fill(over | ~asked, int(ends[0])))
        return [replace(one, answer=text) for one, text in zip(judged, texts, strict=True)]

    def embed(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all batches."""
        images, texts = zip(*self._all(partial(_Model.embed, self), samples), strict=True)
        return torch.cat(images), torch.cat(texts)

    def _all(self, do: Callable[[Sequence[Sample]], Result], samples: Sequence[Sample]) -> list[Result]:
        asked = [partial(do, batch) for batch in batches(samples, self.size)]
        return through_blocks(self.model, self.collator.family, asked)


def longest_answer(collator: Collator, questions: Sequence[Sample]) -> int:
    """Tokens after which an answer to any of the questions is cut."""
    return max(map(collator.answer_length, questions)) + MARGIN


def _first_by_far(logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bool [B]: at every target [B, L] its logit of [B, L, V] leads by more than rounding can change."""
    own = logits.gather(2, targets.clamp(min=0)[..., None])
    others = logits.scatter(2, targets.clamp(min=0)[..., None], -torch.inf).amax(2, keepdim=True)
    lead = LEAD if dtype == torch.float32 else HALF_LEAD
    return ((own - others > lead).squeeze(2) | (targets == IGNORED)).all(1)


def asked_alike(collator: Collator, questions: Sequence[Sample], given: Batch) -> torch.Tensor:
    """Bool [B]: the tokens before the answer are those that generation starts from (decoder-only models)."""
    if not collator.family.labels_shifted:
        return torch.zeros(len(questions), dtype=torch.bool)
    prompts = collator.prompts(questions)
    same = []
    for row, labels in enumerate(given["labels"]):
        asked = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
        start = int((labels != IGNORED).nonzero()[0])
        same.append(torch.equal(given["input_ids"][row][:start], asked))
    return torch.tensor(same)


def _retrieve(run: _Evaluation, samples: Sequence[Sample]) -> list[Row]:
    """Ranks over all different images and texts of the samples."""
    images, texts, done = [], [], 0
    for batch in batches(samples, run.batch_size):
        of_images, of_texts = run.answering.embed(batch)
        images.append(of_images)
        texts.append(of_texts)
        done += len(batch)
        run.report(done, len(samples))
    image_ids = _numbered([sample.image_key for sample in samples])
    text_ids = _numbered([run.answering.collator.caption(sample) for sample in samples])
    image_at, text_at = (np.unique(ids, return_index=True)[1].tolist() for ids in (image_ids, text_ids))  # first places
    similar = F.normalize(torch.cat(texts)[text_at], dim=-1) @ F.normalize(torch.cat(images)[image_at], dim=-1).T
    right = torch.zeros(similar.shape, dtype=torch.bool, device=similar.device)
    right[text_ids, image_ids] = True
    by_text, by_image = _ranks(similar, right), _ranks(similar.T, right.T)
    return [
        Row(
            sample.identity,
            sample.task or UNNAMED_TASK,
            sample.vendor,
            image_to_text=by_image[image],
            text_to_image=by_text[text],
            image=image,
        )
        for sample, image, text in zip(samples, image_ids, text_ids, strict=True)
    ]


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _ranks(similar: torch.Tensor, right: torch.Tensor) -> list[int]:
    """Per row the rank (from 1) of its best right column; a wrong column that ties with it stands before it."""
    best = similar.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return (1 + ((similar >= best) & ~right).sum(1)).tolist()
