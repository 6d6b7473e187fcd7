"""Batches for a model, made from samples by its own processor: chat template, image tokens, pixel values, labels."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any  # tokenizers and processors, and what they give

import torch
import torch.nn.functional as F

from slimvlm.compress.data.processing import encode, prepare_image, render_chat
from slimvlm.compress.data.records import Turn
from slimvlm.compress.data.samples import Sample, batches, open_image
from slimvlm.compress.errors import MissingDependencyError, SampleError, UnsupportedModelError
from slimvlm.compress.models.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

    from slimvlm.compress.models.checkpoint import Loaded

IGNORED = -100
CACHE_BYTES = 256 * 2**20
PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Text:
    """Token ids before the image is put in; `labels` are aligned with them, or decoder targets of their own length."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class _Vision:
    """What the processor makes of one image: tensors for the model, and the tokens that stand for it in the text."""

    tensors: Batch
    ids: list[int]
    types: dict[str, list[int]]


class Collator:
    """Turns samples into batches for `model(**batch)` and `model.generate(**batch)`.

    The layout is the processor's own: its chat template when it has one; prefix and suffix where its call takes a
    `suffix` (PaliGemma); otherwise its image token, a newline and the question, or the question alone where the
    processor puts the image first by itself (BLIP-2). Processed images are kept in a small cache: samples share them.

    Args:
        processor: of the model, as loaded.
        family: its row, which says what labels are.
        model_config: of the whole model.

    Raises:
        MissingDependencyError: there is no processor, because a package it needs is missing.
        UnsupportedModelError: the processor has no tokenizer with offsets or no image processor.
    """

    def __init__(self, processor: ProcessorMixin | None, family: Family, model_config: PreTrainedConfig) -> None:
        if processor is None:
            raise MissingDependencyError(
                f"the processor of this {family.name} model could not be built; most often torchvision is missing: "
                "pip install 'slimvlm[vision]'"
            )
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        if not getattr(self.tokenizer, "is_fast", False) or getattr(processor, "image_processor", None) is None:
            raise UnsupportedModelError(
                f"{type(processor).__name__} lacks an image processor or a tokenizer with character offsets; "
                "save the complete processor (AutoProcessor) beside the weights."
            )
        self.processor, self.family, self.config = processor, family, model_config
        self.max_text_tokens = self._longest()
        self._takes_suffix = "suffix" in inspect.signature(type(processor).__call__).parameters
        self._image_first = getattr(processor, "num_query_tokens", None) is not None
        self._template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        token = getattr(processor, "image_token", None)
        self.image_token = str(getattr(token, "content", token) or "")
        self.image_token_id = self._image_token_id()
        self.placeholder_id = self._placeholder_id()
        self._cache: OrderedDict[Hashable, _Vision] = OrderedDict()
        self._cached_bytes = 0

    # ---------------------------------------------------------------- public

    def training(self, samples: Sequence[Sample], last_turn: bool = False) -> Batch:
        """A right-padded batch with `labels`: answer tokens and the end of the answer, -100 elsewhere.

        Decoder-only models: labels [B, S] unshifted, aligned with `input_ids`. Encoder-decoder: decoder targets [B, L].
        Dual encoders: `pixel_values` and the text, with `return_loss` (a scalar tensor) for the contrastive loss.

        Args:
            last_turn: supervise only the answer of the last turn.

        Raises:
            SampleError: a text is longer than the model can take; the message names the sample.
        """
        if self.family.contrastive:
            return {**self._dual(samples), "return_loss": torch.tensor(True)}
        return self._batch(samples, [self._supervised(sample, last_turn) for sample in samples], left=False)

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """A left-padded batch for `generate`: everything up to the answer of the last turn.

        Raises:
            SampleError: a text is longer than the model can take; the message names the sample.
            ValueError: the model is a dual encoder.
        """
        if self.family.contrastive:
            raise ValueError("a dual encoder does not generate; use training() and its embeddings")
        texts = [_Text(self._prompt(sample), []) for sample in samples]
        return self._batch(samples, texts, left=True)

    def answer(self, sample: Sample) -> list[int]:
        """Ids of the last answer and its end, as they are taught."""
        return [label for label in self._supervised(sample, last_turn=True).labels if label != IGNORED]

    def continued(self, samples: Sequence[Sample], answers: Sequence[list[int]]) -> Batch:
        """As `training`, with these ids where the answers of the last turns are: behind what `prompts` ends with.

        Raises:
            SampleError: as `training`.
        """
        texts = []
        for prompt, answer in zip(map(self._prompt, samples), answers, strict=True):
            together = _Text(prompt + answer, [IGNORED] * len(prompt) + answer)
            texts.append(together if self.family.labels_shifted else _Text(prompt, answer))
        return self._batch(samples, texts, left=False)

    def prompt_text(self, sample: Sample) -> tuple[str, bool]:
        """What `prompts` encodes: the text up to the last answer, and whether the tokenizer adds its special tokens.

        One image token stands for the image (none where the processor puts the image first).
        """
        if self._takes_suffix:
            return f"{self.image_token}{self.tokenizer.bos_token}{self._single(sample).prompt}\n", False
        if self.family.own_decoder:
            return self._single(sample).prompt, True
        text = self._conversation(sample, ask=True)[0]
        return text, self._adds_special(text)

    def caption(self, sample: Sample) -> str:
        """The text a dual encoder is to match with the image: question and answer of the last turn."""
        turn = sample.turns[-1]
        return f"{turn.prompt} {turn.target}".strip()

    def answer_length(self, sample: Sample) -> int:
        """Tokens of the last answer and its end, for the length of a generation."""
        return max(len(self._ids(" " + answer, special=False)) for answer in sample.turns[-1].answers) + 1

    def decode(self, ids: torch.Tensor) -> list[str]:
        """Texts of generated ids [B, T], without special tokens."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    # ---------------------------------------------------------------- text

    def _longest(self) -> int:
        """Tokens the model can take, image tokens included."""
        text = getattr(self.config, "text_config", self.config)
        return int(getattr(text, "max_position_embeddings", None) or self.tokenizer.model_max_length)

    def _image_token_id(self) -> int:
        """Of the model's config, else of the processor; -100 for dual encoders, whose texts hold no image."""
        token = getattr(self.config, "image_token_id", None)
        token = getattr(self.config, "image_token_index", None) if token is None else token
        if token is None and self.image_token:
            token = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return IGNORED if token is None else token

    def _placeholder_id(self) -> int:
        """What stands for the image in a text; in most families the token that then stands for each of its features."""
        known = self.tokenizer.convert_tokens_to_ids(self.image_token) if self.image_token else None
        return self.image_token_id if known in (None, self.tokenizer.unk_token_id) else known

    def _ids(self, text: str, special: bool) -> list[int]:
        ids: list[int] = encode(self.tokenizer, text, add_special_tokens=special)["input_ids"]
        return ids

    def _single(self, sample: Sample) -> Turn:
        turns = sample.turns
        if len(turns) > 1:
            raise SampleError(
                f"{sample.identity}: {type(self.processor).__name__} takes one question per sample, not {len(turns)}."
            )
        return turns[0]

    def _supervised(self, sample: Sample, last_turn: bool) -> _Text:
        if self.family.own_decoder:
            return _Text(self._prompt(sample), self._ended(self._ids(self._single(sample).target, special=True)))
        if self._takes_suffix:
            prompt, answer = self._prompt(sample), self._ended(self._ids(self._single(sample).target, special=False))
            return _Text(prompt + answer, [IGNORED] * len(prompt) + answer)
        text, spans = self._conversation(sample)
        encoding = self._encode(text)
        chosen = spans[-1:] if last_turn else spans
        labels = [
            token if start < end and any(end > first and start < last for first, last in chosen) else IGNORED
            for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        ]
        return _Text(encoding["input_ids"], labels)

    def _prompt(self, sample: Sample) -> list[int]:
        """Ids up to the last answer, one image placeholder in them (none where the processor puts the image first)."""
        return self._ids(*self.prompt_text(sample))

    def _encode(self, text: str) -> Any:
        return encode(self.tokenizer, text, add_special_tokens=self._adds_special(text), return_offsets_mapping=True)

    def _adds_special(self, text: str) -> bool:
        """As apply_chat_template(tokenize=True) does: not where the template wrote the first special token itself."""
        bos = self.tokenizer.bos_token
        return not (self._template and bos and text.startswith(bos))

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _conversation(self, sample: Sample, ask: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of all turns (with `ask`: up to the last answer) and the character spans of the answers in it."""
        render = self._chat if self._template else self._plain
        turns = sample.turns
        spans: list[tuple[int, int]] = []
        text = ""
        for count in range(1, len(turns) + 1):
            question, text = render(turns[:count], True), render(turns[:count], False)
            if not text.startswith(question.rstrip()):
                raise UnsupportedModelError(
                    f"the chat template of {type(self.processor).__name__} opens an answer differently to ask; its "
                    "tokens cannot be told apart. Use a template whose generation prompt opens every answer."
                )
            start = len(question) if text.startswith(question) else len(question.rstrip())
            if ask and count == len(turns):
                return question, spans
            spans.append((start, self._answer_end(text, start)))
        end = spans[-1][1]
        closing = self.tokenizer.eos_token or ""
        if not text[:end].endswith(closing):
            text, spans[-1] = text[:end] + closing, (spans[-1][0], end + len(closing))
        return text[: spans[-1][1]], spans

    def _answer_end(self, text: str, start: int) -> int:
        """After the end-of-sequence token where the template writes one, else after the last visible character."""
        closing = self.tokenizer.eos_token
        found = text.find(closing, start) if closing else -1
        return found + len(closing) if found >= 0 else len(text.rstrip())

    def _chat(self, turns: Sequence[Turn], ask: bool) -> str:
        messages: list[dict[str, Any]] = []
        for index, turn in enumerate(turns):
            content = [{"type": "image"}] if index == 0 else []
            if turn.prompt:
                content.append({"type": "text", "text": turn.prompt})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.target}]})
        return render_chat(self.processor, messages[:-1] if ask else messages, ask)

    def _plain(self, turns: Sequence[Turn], ask: bool) -> str:
        text = "" if self._image_first else f"{self.image_token}\n"
        for index, turn in enumerate(turns):
            text += ("\n" if index else "") + turn.prompt
            if ask and index == len(turns) - 1:
                return text
            text += (" " if turn.prompt else "") + turn.target
        return text

    # ---------------------------------------------------------------- images

    def _vision(self, sample: Sample) -> _Vision:
        key = sample.image_key
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        vision = self._process(sample)
        self._cache[key] = vision
        self._cached_bytes += _size(vision)
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= _size(self._cache.popitem(last=False)[1])
        return vision

    def _process(self, sample: Sample) -> _Vision:
        images, who = [open_image(sample)], sample.identity
        if self.family.contrastive:
            return _Vision(prepare_image(self.processor.image_processor, who, images=images), [], {})
        text = ["" if self._image_first else self.image_token]
        out = prepare_image(self.processor, who, images=images, text=text, add_special_tokens=False)
        ids = out.pop("input_ids")[0].tolist()
        types = {name: out.pop(name)[0].tolist() for name in PER_TOKEN if name in out}
        for name in ("attention_mask", "labels"):
            out.pop(name, None)
        if self._takes_suffix:  # this processor writes an empty question around the image
            ids, types = [token for token in ids if token == self.image_token_id], {}
        return _Vision(out, ids, types)

    # ---------------------------------------------------------------- batches

    def _batch(self, samples: Sequence[Sample], texts: Sequence[_Text], left: bool) -> Batch:
        visions = [self._vision(sample) for sample in samples]
        aligned = self.family.labels_shifted
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for sample, text, vision in zip(samples, texts, visions, strict=True):
            at, after = self._placeholder(sample, text.ids)
            ids = text.ids[:at] + vision.ids + text.ids[after:]
            self._require_room(sample, len(ids), f" with the image's {len(vision.ids)}")
            rows["input_ids"].append(ids)
            rows["attention_mask"].append([1] * len(ids))
            if text.labels:
                shown = text.labels[:at] + [IGNORED] * len(vision.ids) + text.labels[after:] if aligned else text.labels
                rows["labels"].append(shown)
            for name, types in vision.types.items():
                rows.setdefault(name, []).append([0] * at + types + [0] * (len(text.ids) - after))
            if self._takes_suffix:
                answer = sum(label != IGNORED for label in text.labels)
                rows.setdefault("token_type_ids", []).append([0] * (len(ids) - answer) + [1] * answer)
        fill = {"input_ids": self._pad_id(), "labels": IGNORED}
        batch = {name: _pad(row, fill.get(name, 0), left) for name, row in rows.items() if row}
        return {**batch, **_join([vision.tensors for vision in visions])}

    def _placeholder(self, sample: Sample, ids: list[int]) -> tuple[int, int]:
        """Where the image goes: before everything, or in place of the one image token."""
        found = [index for index, token in enumerate(ids) if token == self.placeholder_id]
        wanted = 0 if self._image_first else 1
        if len(found) != wanted:
            raise SampleError(
                f"{sample.identity}: the text holds {len(found)} image tokens {self.image_token!r}, {wanted} expected; "
                "remove the token from the sample's text (the image is placed by the chat template)."
            )
        return (found[0], found[0] + 1) if wanted else (0, 0)

    def _require_room(self, sample: Sample, tokens: int, counted: str = "") -> None:
        if tokens > self.max_text_tokens:
            raise SampleError(
                f"{sample.identity}: {tokens} tokens{counted}; the model takes at most {self.max_text_tokens}. "
                "Shorten the text or leave the sample out."
            )

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.tokenizer.eos_token_id or 0)

    def _dual(self, samples: Sequence[Sample]) -> Batch:
        """Pixel values [B, 3, height, width] and texts; SigLIP wants texts padded to full length, without a mask."""
        encoded = [self._ids(self.caption(sample), special=True) for sample in samples]
        for sample, ids in zip(samples, encoded, strict=True):
            self._require_room(sample, len(ids))
        masked = "attention_mask" in self.tokenizer.model_input_names
        width = None if masked else self.max_text_tokens
        batch = {"input_ids": _pad(encoded, self._pad_id(), left=False, width=width)}
        if masked:
            batch["attention_mask"] = _pad([[1] * len(ids) for ids in encoded], 0, left=False)
        return {**batch, **_join([self._vision(sample).tensors for sample in samples])}


def _size(vision: _Vision) -> int:
    return sum(tensor.nbytes for tensor in vision.tensors.values())


def _pad(rows: Sequence[Sequence[int]], fill: int, left: bool, width: int | None = None) -> torch.Tensor:
    """int64 [B, width], by default that of the longest row."""
    width = width or max(map(len, rows))
    padding = [[fill] * (width - len(row)) for row in rows]
    padded = [[*more, *row] if left else [*row, *more] for row, more in zip(rows, padding, strict=True)]
    return torch.tensor(padded, dtype=torch.long)


def _join(parts: Sequence[Batch]) -> Batch:
    """Tensors of single images along dim 0; the other dims (tiles of an image) are padded with zeros to the largest."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        joined[name] = torch.cat([_grow(tensor, largest) for tensor in tensors])
    return joined


def _grow(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    missing = [wanted - have for have, wanted in zip(tensor.shape[1:], sizes, strict=True)]
    if not any(missing):
        return tensor
    return F.pad(tensor, [amount for extra in reversed(missing) for amount in (0, extra)])


def collator_of(loaded: Loaded) -> Collator:
    """The collator of a loaded model.

    Raises:
        MissingDependencyError, UnsupportedModelError: as `Collator`.
    """
    return Collator(loaded.processor, loaded.family, loaded.model.config)


def collated(collator: Collator, samples: Sequence[Sample], batch_size: int) -> list[Callable[[], Batch]]:
    """One function per batch: a batch is made when it is read, and not kept."""
    return [partial(collator.training, batch) for batch in batches(samples, batch_size)]
