"""Pack several questions about one picture into one row, each blind to the others.

A row is `<s> <user> <image>...` once, then per question its words, `<assistant>`, the answer and `</s>`. The mask lets
a question see the shared prefix and itself, and its positions continue from the prefix, so a packed row computes
exactly what the questions asked one by one would: seven times the supervision for little more than the price of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from slimvlm.demo.model import IMAGE_TOKENS, PATCH
from slimvlm.demo.scenes import SIDE, Question, Scene

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """`pixels` [B, 3, side, side]; `ids`, `positions`, `labels` [B, S]; `mask` [B, 1, S, S], added to the scores.

    `segments` [B, S] numbers the questions of a row from 1 (0: the prefix, -1: padding). `labels` stand at the token
    that predicts them: nothing is left to shift.
    """

    pixels: Tensor
    ids: Tensor
    positions: Tensor
    segments: Tensor
    labels: Tensor
    mask: Tensor


def pack(
    images: Sequence[Image.Image],
    asked: Sequence[Sequence[Question]],
    tokenizer: PreTrainedTokenizerFast,
    early: int = 0,
) -> Batch:
    """Rows of equal length from B pictures and the questions about each.

    `early`: so many last words of a question have to predict the first word of its answer, too.
    """
    rows = [_row(questions, tokenizer, early) for questions in asked]
    length = max(len(row) for row in rows)
    table = np.full((len(rows), length, 4), (tokenizer.pad_token_id, 0, -1, IGNORE))
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    ids, positions, segments, labels = torch.from_numpy(table).unbind(-1)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    return Batch(pixels, ids, positions, segments, labels, _mask(segments))


def _row(questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast, early: int) -> list[tuple]:
    ids: Callable[[list[str]], Any] = tokenizer.convert_tokens_to_ids  # of a list a list, of a word a number
    prefix: list[int] = ids(["<s>", "<user>", *["<image>"] * IMAGE_TOKENS])
    row = [(token, place, 0, IGNORE) for place, token in enumerate(prefix)]
    for segment, question in enumerate(questions, start=1):
        words: list[int] = ids([*question.text.split(), "<assistant>"])
        answer: list[int] = ids([*question.answer.split(), "</s>"])
        labels = [IGNORE] * (len(words) - 1 - early) + answer[:1] * early + answer
        for offset, (token, label) in enumerate(zip(words + answer[:-1], labels, strict=True)):
            row.append((token, len(prefix) + offset, segment, label))
    return row


def _mask(segments: Tensor) -> Tensor:
    """Causal, and a question sees only the prefix and itself; a padding row sees itself, so that no row is empty."""
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & ((key == query) | ((key == 0) & (query > 0)))
    return torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]


def answer_logits(
    model: LlavaForConditionalGeneration, batch: Batch, features: ModelOutput | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [N, vocabulary] and labels [N] of the N answer tokens of the batch.

    `features`: what `get_image_features` gave for the pixels, if that was called already.
    """
    features = features or model.model.get_image_features(pixel_values=batch.pixels)
    hidden = model.model(
        input_ids=batch.ids,
        mm_encoder_outputs={"image": features},
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    scored = batch.labels != IGNORE
    return model.lm_head(hidden[scored]), batch.labels[scored]


def patch_logits(model: LlavaForConditionalGeneration, features: ModelOutput) -> Tensor:
    """What each projected patch would say, read like a last hidden state: [B, image tokens, vocabulary]."""
    return model.lm_head(model.model.language_model.norm(torch.stack(features["pooler_output"])))


def patch_words(scenes: Sequence[Scene], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The word of the object in the cell each patch belongs to, `nothing` where it is empty: [B, image tokens]."""
    words = [tokenizer.convert_tokens_to_ids([word or "nothing" for word in scene.objects]) for scene in scenes]
    side = SIDE // PATCH // 2
    grid = torch.tensor(words).view(-1, 2, 2)
    return grid.repeat_interleave(side, 1).repeat_interleave(side, 2).flatten(1)


@torch.no_grad()
def exact_matches(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """Whether greedy decoding would give the whole answer: [Q] booleans, questions row by row."""
    logits, labels = answer_logits(model, batch)
    scored = batch.labels != IGNORE
    rows = torch.arange(len(batch.ids))[:, None].expand_as(batch.ids)[scored]
    owner = rows * (int(batch.segments.max()) + 1) + batch.segments[scored]
    _, owner = owner.unique(return_inverse=True)
    wrong = torch.zeros(int(owner.max()) + 1).index_add_(0, owner, (logits.argmax(-1) != labels).float())
    return wrong == 0
