"""A processor for every model type: the real ones need files of a checkpoint, and say nothing of what is measured here.

Words become numbers by the tokenizer of the tests, an image becomes 16 x 16 pixels in the form of images.py, and as
many placeholders as the model gives features.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimvlm.export.client.preprocessing import NoRecipeError
from tiny_types import images
from tiny_types.facts import Facts

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
from tiny_models import IMAGE_TOKEN
from tiny_processors import tiny_tokenizer

TYPED = ("mm_token_type_ids", "token_type_ids")


class ImagePart:
    """What an export asks of an image processor: how it would be saved, and a recipe, which this has not."""

    patch_size, merge_size, temporal_patch_size = 4, 2, 2
    size = MappingProxyType({"shortest_edge": 16, "longest_edge": 16})
    image_mean = image_std = (0.5, 0.5, 0.5)
    rescale_factor = 1 / 255

    @property
    def resample(self) -> int:
        """No recipe."""
        raise NoRecipeError("a processor that stands in for the real one has no recipe")

    def to_json_string(self) -> str:
        """No options."""
        return json.dumps({"image_processor_type": "ImagePart"})


class StandIn:
    """Of one model; called as processors are."""

    image_token = "<image>"

    def __init__(self, model: Any, facts: Facts) -> None:
        self.tokenizer, self.image_processor = tiny_tokenizer("<s> $0"), ImagePart()
        self.config, self.facts, self.takes = model.config, facts, images.inputs_of(model)
        if facts.first:
            self.num_query_tokens = facts.tokens or 0
        self.tokens = self._count(model) if facts.tokens is None else facts.tokens

    def __call__(self, images: Any, text: Any, **_: Any) -> dict[str, Tensor]:
        """Input ids of the image alone, with what is around it, and its tensors."""
        picture = images[0].convert("RGB").resize((16, 16))
        pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
        around = self.facts.around
        ids = torch.tensor([[*around[:1], *[IMAGE_TOKEN] * self.tokens, *around[1:]]])
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.prepare(pixels)}
        kinds = {name: 1 for name in TYPED if name in self.takes} | dict(self.facts.per_token)
        return out | {name: torch.full_like(ids, value) for name, value in kinds.items()}

    def prepare(self, pixels: Tensor) -> dict[str, Tensor]:
        """Tensors of one image, pixels [3, 16, 16]."""
        if self.facts.image is not None:
            return self.facts.image(self.config, pixels)
        return images.default(self.config, pixels, self.takes)

    def save_pretrained(self, folder: Any) -> None:
        """Only the tokenizer can be read again."""
        self.tokenizer.save_pretrained(folder)

    def to_dict(self) -> dict[str, Any]:
        """No options."""
        return {}

    @torch.no_grad()
    def _count(self, model: Any) -> int:
        """Features that the model itself makes of an image."""
        owner = model if hasattr(model, "get_image_features") else model.base_model
        found = owner.get_image_features(**self.prepare(torch.randn(3, 16, 16)))
        if hasattr(found, "last_hidden_state"):
            found = found.last_hidden_state if found.pooler_output is None else found.pooler_output
        parts = found if isinstance(found, list | tuple) else [found]
        return sum(part.numel() // part.shape[-1] for part in parts)
