"""What a model is asked about a batch of samples: the forward inputs, which positions have labels, which tokens count.

The one place that says so, for calibration, recovery and evaluation. Samples count one by one, however they come.
The exception is a dual encoder: its contrastive loss compares the samples of a batch with each other by definition.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast  # Any: transformers' configs

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimvlm.compress.data.collate import IGNORED
from slimvlm.compress.models.families import Family, Tower
from slimvlm.compress.models.groups import Group
from slimvlm.compress.models.projections import Member

# Streams of tokens: the text model's input, what a decoder of its own reads, the patches of the images.
TEXT, TARGETS, PATCHES = "text", "targets", "patches"
Inputs = dict[str, Tensor | int]  # keyword arguments of a forward; flags are integers, too
Masks = dict[str, Tensor | None]  # per stream (or block) the tokens that count, bool [B, S]; None: all of them
Value = TypeVar("Value")


@dataclass(frozen=True)
class Tally:
    """Counts of a batch; tokens are those of the counted samples, without padding."""

    samples: int = 0
    skipped: int = 0
    image_tokens: int = 0
    text_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Posed:
    """A batch as any model is asked it, where the batch is.

    Attributes:
        inputs: keyword arguments of the forward; no labels, whose loss would be computed for nobody.
        labels: [B, L] aligned with the logits; None for a dual encoder.
        masks: per stream the tokens that are no padding, bool [B, S]; None for all of them.
    """

    inputs: Inputs
    labels: Tensor | None
    masks: Masks


@dataclass(frozen=True)
class Question:
    """A batch ready for the model, on its device.

    Attributes:
        inputs: keyword arguments of the forward.
        labels: [B', L] aligned with the logits that `chosen` gives; None for a dual encoder.
        rows: the samples that count, None for all.
        positions: logit positions with a label, if the forward could not be told to compute only those.
        masks: per stream, or block of a tower where its choice is its own, the tokens that count, bool [B, S]; None
            for all of them.
        images: the image tokens of the stream TEXT, bool [B, S]; None for a dual encoder, whose text holds none.
    """

    inputs: Inputs
    labels: Tensor | None
    rows: Tensor | None
    positions: Tensor | None
    masks: Masks
    tally: Tally = field(default_factory=Tally)
    images: Tensor | None = None

    def chosen(self, logits: Tensor) -> Tensor:
        """The model's logits at the labels, [B', L, V]."""
        logits = logits if self.positions is None else logits[:, self.positions]
        return logits if self.rows is None else logits[self.rows]


def stream_of(family: Family, group: Group, member: Member) -> str:
    """Which tokens a linear reads."""
    if group.key.endswith("cross_attn") and member.heads == "kv":  # what the tower before this one made
        return TEXT if family.own_decoder else PATCHES
    return stream_through(family, group.home)


def masked(stream: str) -> str | None:
    """The stream whose masks say what counts of it; None: all of it does."""
    return None if stream == PATCHES else stream


def stream_through(family: Family, tower: Tower) -> str:
    """Which tokens go through the blocks of a tower."""
    if tower.modality == "vision":
        return PATCHES
    return TARGETS if family.own_decoder and tower.name == "decoder" else TEXT


def pose(model: nn.Module, family: Family, batch: Mapping[str, Tensor]) -> Posed:
    """What `model` is asked about a batch, and which of its tokens are no padding.

    Raises:
        ValueError: the batch has no labels.
    """
    text = batch.get("attention_mask")
    masks = {TEXT: None if text is None else text.bool()}
    inputs: Inputs = {**batch}
    if family.contrastive:
        return Posed({**inputs, "return_loss": True}, None, masks)
    labels = aligned(family, batch)
    inputs["use_cache"] = False
    del inputs["labels"]
    if family.own_decoder:
        inputs["decoder_input_ids"] = _decoder_inputs(model, family.towers[-1], labels)
        own = batch.get("decoder_attention_mask")
        masks[TARGETS] = labels != IGNORED if own is None else own.bool()
    return Posed(inputs, labels, masks)


def aligned(family: Family, batch: Mapping[str, Tensor]) -> Tensor:
    """The labels [B, L] of a batch, each where its logits are.

    Raises:
        ValueError: the batch has none.
    """
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("a batch has no labels; collate it with answers (training batches)")
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if family.labels_shifted else labels


def ask(model: nn.Module, family: Family, batch: Mapping[str, Tensor]) -> Question | None:
    """The batch as a question to `model`; None if no sample can count (no supervised token, or nothing to contrast).

    Raises:
        ValueError: the batch has no labels.
    """
    posed = pose(model, family, batch)
    text = posed.masks[TEXT]
    text = torch.ones_like(batch["input_ids"], dtype=torch.bool) if text is None else text
    if posed.labels is None:
        samples = len(text)
        if samples < 2:  # one pair has nothing to be told apart from
            return None
        tally = Tally(samples, 0, _patches(model, batch), int(text.sum()))
        return _on_device(model, Question(posed.inputs, None, None, None, {TEXT: text}, tally))
    supervised = posed.labels != IGNORED
    rows = supervised.any(1)
    if not rows.any():
        return None
    positions = supervised.any(0).nonzero().flatten()
    labels = posed.labels[rows][:, positions]
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    inputs = {**posed.inputs, "logits_to_keep": positions} if keep else posed.inputs
    masks = {TEXT: text & rows[:, None]}
    if (targets := posed.masks.get(TARGETS)) is not None:
        masks[TARGETS] = targets & rows[:, None]
    images = torch.isin(batch["input_ids"], torch.tensor(image_tokens(model.config)))
    seen = int((images & masks[TEXT]).sum())
    written = sum(int(mask.sum()) for mask in masks.values()) - seen
    tally = Tally(int(rows.sum()), int((~rows).sum()), seen, written)
    asked = None if rows.all() else rows, None if keep else positions
    return _on_device(model, Question(inputs, labels, *asked, {**masks}, tally, images))


def placed(batch: Mapping[str, Value], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Value]:
    """A batch on a device, floating point in `dtype` if one is given; copies from pinned memory do not wait."""

    def move(value: Value) -> Value:
        if not isinstance(value, Tensor):
            return value
        return cast(Value, value.to(device, dtype if value.is_floating_point() else None, non_blocking=True))

    return {name: move(value) for name, value in batch.items()}


def patch_mask(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """True for patches that hold a pixel, [images, patches], without padding images; None: all patches hold one."""
    pixels = batch.get("pixel_attention_mask")
    if pixels is None:
        return None
    if pixels.ndim == 2:  # of patches already, where they come as rows (SigLIP 2)
        return pixels.bool()
    config: Any = model.config
    real = batch["pixel_values"].flatten(0, 1).flatten(1).any(1)
    patches = F.max_pool2d(pixels.flatten(0, 1)[real][:, None].float(), config.vision_config.patch_size)
    return patches.flatten(1).bool()


def _decoder_inputs(model: nn.Module, tower: Tower, labels: Tensor) -> Tensor:
    """The labels one step later, by the rule of the language model that holds the decoder."""
    path = tower.blocks
    while path:
        path = path.rpartition(".")[0]
        shift = getattr(model.get_submodule(path), "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            shifted: Tensor = shift(labels)
            return shifted
    raise ValueError(f"no module above {tower.blocks} makes decoder inputs from labels")


def _patches(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    config: Any = model.config
    size: int = config.vision_config.patch_size
    pixels: Tensor = batch["pixel_values"]
    return len(pixels) * math.prod(side // size for side in pixels.shape[-2:])


def image_tokens(config: object) -> list[int]:
    """Tokens in whose place the features of images (or frames) are read, by a model's config."""
    found = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return [token for token in found if token is not None]


def _on_device(model: nn.Module, question: Question) -> Question:
    """The same question where the model is."""
    weight = next(model.parameters())
    masks = {name: None if mask is None or mask.all() else mask for name, mask in question.masks.items()}
    names = ("labels", "rows", "positions", "images")
    parts = {name: getattr(question, name) for name in names}
    masks, parts = (placed(some, weight.device) for some in (masks, parts))
    inputs = placed(question.inputs, weight.device, weight.dtype)
    return Question(inputs, masks=masks, tally=question.tally, **parts)
