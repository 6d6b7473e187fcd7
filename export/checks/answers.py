"""Torch's greedy answers, and the same answers retold by a runtime: its own loop, step by step, along torch's tokens.
Of a model that is read block by block torch says what comes next along answers that are given to it: one forward for
all tokens of all samples, where a generation would read all blocks for every token.

What is compared are the logits of every step. That says whether a model is the same where tokens do not: two tokens
may be as good as tied, and after one other token two answers have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from slimvlm.compress.data.collate import IGNORED, Collator
from slimvlm.compress.data.questions import ask
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.evaluation.evaluate import greedy
from slimvlm.export.checks.parity import Case, Difference, measure
from slimvlm.export.graphs.graph import Model
from slimvlm.export.running.generation import Arrays, Prompting, Runner, divergences, steps, token_losses, until_end
from slimvlm.export.running.names import DECODER

LONG = 1024  # tokens of the longest prompt that is tried, where the model can take it; beyond its widest window, if any
WIDEST = 8192  # a prompt beyond a wider window is not tried: minutes and gigabytes for every variant


@dataclass(frozen=True, slots=True)
class Answers:
    """Torch's answers to a batch of prompts: tokens [B, T], padded after their end, and the logits [B, T, V] by which
    torch chooses each: the tokens themselves, or others where the tokens were given.
    """

    prompts: Arrays
    tokens: np.ndarray
    logits: np.ndarray

    def chosen(self, end: Sequence[int]) -> list[list[int]]:
        """By torch, row by row, up to the last of the tokens that count."""
        rows = (len(until_end(row, end)) for row in self.tokens)
        return [row[:count].argmax(-1).tolist() for row, count in zip(self.logits, rows, strict=True)]


@dataclass(frozen=True, slots=True)
class Retold:
    """Torch's answers by a runtime, row by row up to their end: its own choices, the cost of torch's tokens, KL."""

    choices: list[list[int]]
    losses: list[np.ndarray]
    torch_losses: list[np.ndarray]
    divergences: list[np.ndarray]
    difference: Difference


def torch_answers(model: Model, collator: Collator, prompts: Arrays, prompting: Prompting, most: int) -> Answers:
    """What `generate` of the model itself gives, with its own masks and cache.

    Args:
        most: new tokens per answer.
    """
    tensors = {name: torch.from_numpy(array) for name, array in prompts.items()}
    config = greedy(model, collator, most)
    config.update(return_dict_in_generate=True, output_logits=True)
    with torch.inference_mode():
        given = model.generate(**tensors, generation_config=config)
    logits = torch.stack(given.logits, dim=1).float().numpy()
    return Answers(prompts, given.sequences[:, -logits.shape[1] :].numpy(), logits)


def forced_answers(
    model: Model, collator: Collator, samples: Sequence[Sample], prompting: Prompting, most: int
) -> Answers:
    """What the model says along the right answers, or where there is none along the question said once more.

    Args:
        most: tokens of an answer, which is cut behind them.
    """
    given = [_ended(collator.answer(_answered(sample)), prompting.end)[:most] for sample in samples]
    question = ask(model, collator.family, collator.continued(samples, given))
    assert question is not None and question.labels is not None  # every answer has a token, its end
    logits = question.chosen(model(**question.inputs).logits).float()
    width = max(map(len, given))
    tokens = np.full((len(given), width), prompting.end[0])
    said = np.zeros((*tokens.shape, logits.shape[-1]), np.float32)
    for row, (answer, labels) in enumerate(zip(given, question.labels, strict=True)):
        tokens[row, : len(answer)] = answer
        said[row, : len(answer)] = logits[row, labels != IGNORED].numpy()
    prompts = {name: tensor.numpy() for name, tensor in collator.prompts(samples).items()}
    return Answers(prompts, tokens, said)


def _answered(sample: Sample) -> Sample:
    turn = sample.turns[-1]
    return sample if turn.target else replace(sample, turns=(*sample.turns[:-1], replace(turn, answers=(turn.prompt,))))


def _ended(answer: list[int], end: Sequence[int]) -> list[int]:
    return answer if answer and answer[-1] in end else [*answer, end[0]]


def retell(runner: Runner, prompting: Prompting, answers: Answers, what: str) -> Retold:
    """Generates along torch's tokens."""
    most = answers.tokens.shape[1]
    told = list(steps(runner, prompting, answers.prompts, most, follow=answers.tokens))
    logits = np.stack([logits for _, logits in told], axis=1)
    choices, losses, torch_losses, apart, found, wanted = [], [], [], [], [], []
    for row, tokens in enumerate(answers.tokens):
        real = until_end(tokens, prompting.end)
        choices.append(logits[row, : len(real)].argmax(-1).tolist())
        found.append(logits[row, : len(real)])
        wanted.append(answers.logits[row, : len(real)])
        losses.append(token_losses(found[-1], real))
        torch_losses.append(token_losses(wanted[-1], real))
        apart.append(divergences(wanted[-1], found[-1]))
    case = Case(DECODER, what, answers.prompts, {"logits": np.concatenate(wanted)})
    return Retold(choices, losses, torch_losses, apart, measure(case, {"logits": np.concatenate(found)}))


def long_sample(collator: Collator, sample: Sample, most: int, window: int) -> Sample:
    """A sample whose question is repeated up to LONG tokens, or as many as the model takes besides its answer.

    What a model sees only part of (a window, a table of positions) differs in long prompts alone.

    Args:
        most: tokens of the answer.
        window: the widest that the model attends through, which the prompt exceeds by LONG; 0: none.
    """
    turn = sample.turns[-1]
    wanted = LONG + (window if window <= WIDEST else 0)
    room = min(wanted, collator.max_text_tokens - most) - collator.prompts([sample])["input_ids"].shape[1]
    each = len(collator.tokenizer(f"{turn.prompt} ", add_special_tokens=False)["input_ids"]) + 1
    asked = f"{turn.prompt} " * max(0, room // each) + turn.prompt
    return replace(sample, turns=(replace(turn, prompt=asked),))


def shares(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> tuple[int, float]:
    """How many rows are equal, and the share of equal tokens."""
    equal = sum(list(left) == list(right) for left, right in zip(found, wanted, strict=True))
    same = sum(a == b for left, right in zip(found, wanted, strict=True) for a, b in zip(left, right, strict=True))
    return equal, same / max(1, sum(map(len, wanted)))
