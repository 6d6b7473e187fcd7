"""What a model is asked about a batch of samples, and what it costs: the forward inputs, the loss, and who counts.

The loss is a SUM over samples of each sample's own mean, so gradients do not depend on how samples are batched. The
exception is a dual encoder: its contrastive loss compares the samples of a batch with each other by definition.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimvlm.compress.data.collate import IGNORED, Batch
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.families import Family
from slimvlm.compress.models.groups import Group, Member

TEXT, TARGETS = "text", "targets"  # streams of tokens: the text model's input; the decoder side of an encoder-decoder


@dataclass(frozen=True)
class Tally:
    """Counts of a batch; tokens are those of the counted samples, without padding."""

    samples: int = 0
    skipped: int = 0
    image_tokens: int = 0
    text_tokens: int = 0


@dataclass(frozen=True)
class Question:
    """A batch ready for the model, on its device.

    Attributes:
        inputs: keyword arguments of the forward.
        labels: [B', L] aligned with the logits that `rows` and `positions` select; None for a dual encoder.
        rows: the samples that count, None for all.
        positions: logit positions with a label, if the forward could not be told to compute only those.
        masks: per stream the tokens that count, bool [B, S]; None for all of them.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    rows: Tensor | None
    positions: Tensor | None
    masks: dict[str, Tensor | None]
    tally: Tally = field(default_factory=Tally)


def stream_of(family: Family, group: Group, member: Member) -> str:
    """Which tokens a row-cut linear reads: a separate decoder's own, else the text model's input."""
    if family.kind != "encoder-decoder" or group.tower != "decoder":
        return TEXT
    return TEXT if group.key.endswith("cross_attn") and member.heads == "kv" else TARGETS


def ask(model: nn.Module, family: Family, batch: Mapping[str, Any]) -> Question | None:
    """The batch as a question to `model`; None if no sample can count (no supervised token, or nothing to contrast).

    Raises:
        CalibrationError: the batch has no labels.
    """
    if family.kind == "dual-encoder":
        return _ask_dual(model, batch)
    labels = batch.get("labels")
    if labels is None:
        raise CalibrationError("a calibration batch has no labels; collate it with answers (training batches)")
    inputs = dict(batch)
    if family.kind == "decoder":
        del inputs["labels"]
        inputs["use_cache"] = False
        targets = labels[:, 1:]
    else:  # the labels stay: the model makes its decoder inputs from them
        inputs["use_cache"] = False
        targets = labels
    supervised = targets != IGNORED
    rows = supervised.any(1)
    if not rows.any():
        return None
    positions = supervised.any(0).nonzero().flatten()
    labels = targets[rows][:, positions]
    keep = family.kind == "decoder" and "logits_to_keep" in inspect.signature(model.forward).parameters
    if keep:
        inputs["logits_to_keep"] = positions
    text = _text_mask(batch) & rows[:, None]
    masks = {TEXT: text}
    if family.kind == "encoder-decoder":
        own = batch.get("decoder_attention_mask")
        masks[TARGETS] = (supervised if own is None else own.bool()) & rows[:, None]
    images = int(((batch["input_ids"] == _image_token(model)) & text).sum())
    written = sum(int(mask.sum()) for mask in masks.values()) - images
    tally = Tally(int(rows.sum()), int((~rows).sum()), images, written)
    return _on_device(
        model, Question(inputs, labels, None if rows.all() else rows, None if keep else positions, masks, tally)
    )


def _ask_dual(model: nn.Module, batch: Mapping[str, Any]) -> Question | None:
    samples = batch["input_ids"].shape[0]
    if samples < 2:  # one pair has nothing to be told apart from
        return None
    text = _text_mask(batch)
    config: Any = model.config
    patch = config.vision_config.patch_size
    patches = math.prod(side // patch for side in batch["pixel_values"].shape[-2:])
    tally = Tally(samples, 0, batch["pixel_values"].shape[0] * patches, int(text.sum()))
    return _on_device(model, Question({**batch, "return_loss": True}, None, None, None, {TEXT: text}, tally))


def _text_mask(batch: Mapping[str, Any]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _image_token(model: nn.Module) -> int:
    token = getattr(model.config, "image_token_id", None)
    return IGNORED if token is None else token


def _on_device(model: nn.Module, question: Question) -> Question:
    """The same question where the model is; copies do not wait (they overlap if the batch is in pinned memory)."""

    weight = next(model.parameters())

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = weight.dtype if value.is_floating_point() else None
        return value.to(device=weight.device, dtype=dtype, non_blocking=True)

    return Question(
        {name: move(value) for name, value in question.inputs.items()},
        move(question.labels),
        move(question.rows),
        move(question.positions),
        {name: None if mask is None or mask.all() else move(mask) for name, mask in question.masks.items()},
        question.tally,
    )


def placed(model: Any, batch: Batch) -> Batch:
    """A batch on the model's device, floating point in its dtype."""
    return {
        name: tensor.to(device=model.device, dtype=model.dtype if tensor.is_floating_point() else None)
        for name, tensor in batch.items()
    }
