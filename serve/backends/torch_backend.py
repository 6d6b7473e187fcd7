"""The Hugging Face model itself, as `slimvlm.load` gives it, behind the interface of backends.py."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from slimvlm.compress.models.families import Family
from slimvlm.export.running.generation import Arrays
from slimvlm.export.running.runners import Value

Model = Any  # of transformers: its families have no common type that could be called
TEXT_ONLY = ("input_ids", "attention_mask")


class TorchBackend:
    """A model of any family, in eval mode.

    The vision phase is the model's own `get_image_features`, whose whole output goes into its forward, as `generate`
    does it. All rows of a batch have the same length, so no mask hides anything and positions just count up.

    Args:
        model: of transformers, on its device, in its dtype.
        family: its row of the family table.
    """

    def __init__(self, model: Model, family: Family) -> None:
        self.model = model
        self.family = family
        self.speaker = model
        # BLIP-2 cannot go on without pixels: what it generates comes from the language model inside.
        if inspect.signature(model.forward).parameters["pixel_values"].default is not None:
            self.speaker = model.language_model
        self._dual = family.contrastive
        self._encoder = family.own_decoder
        keeps = "logits_to_keep" in inspect.signature(self.speaker.forward).parameters
        self._last_only = {"logits_to_keep": 1} if keeps else {}
        self._sees = set(inspect.signature(model.base_model.get_image_features).parameters)
        self._batch: dict[str, Tensor] = {}
        self._state: dict[str, Value] = {}

    def place(self, arrays: Arrays) -> None:
        """See `Backend`."""
        device, dtype = self.model.device, self.model.dtype
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._batch = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()
        }

    def vision(self) -> Value:
        """See `Backend`."""
        seen = {name: tensor for name, tensor in self._batch.items() if name in self._sees}
        return self.model.base_model.get_image_features(**seen, return_dict=True) if "pixel_values" in seen else None

    def text(self) -> Value:
        """See `Backend`."""
        return self.model.get_text_features(**{name: self._batch[name] for name in TEXT_ONLY if name in self._batch})

    def prefill(self, features: Value, new_tokens: int) -> Tensor:
        """See `Backend`."""
        ids = self._batch["input_ids"]
        if features is None:
            model: Model = self.speaker
            inputs: dict[str, Value] = {name: self._batch[name] for name in TEXT_ONLY}
        else:
            rest = {name: tensor for name, tensor in self._batch.items() if name != "pixel_values"}
            model, inputs = self.model, {**rest, "pixel_values": None, "mm_encoder_outputs": {"image": features}}
        if self._encoder:
            inputs["decoder_input_ids"] = ids.new_full((len(ids), 1), self.speaker.config.decoder_start_token_id)
        output = model(**inputs, use_cache=True, **self._last_only)
        output = getattr(output, "language_model_outputs", None) or output
        self._state = {"past_key_values": output.past_key_values, "use_cache": True, **self._last_only}
        if self._encoder:
            self._state["encoder_outputs"] = BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
            self._state["attention_mask"] = self._batch["attention_mask"]
        return _last(output)

    def step(self, token: Tensor) -> Tensor:
        """See `Backend`."""
        if self._encoder:
            return _last(self.speaker(decoder_input_ids=token, **self._state))
        return _last(self.speaker(input_ids=token, **self._state))


def _last(output: Value) -> Tensor:
    """Logits [B, V] of the last token, of what a model of transformers gave."""
    logits: Tensor = output.logits
    return logits[:, -1]
