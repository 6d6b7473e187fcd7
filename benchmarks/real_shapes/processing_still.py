"""Qwen's processor without its video part, which needs torchvision; it lies in the checkpoints of `making.py`."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2VLProcessor


class StillQwenProcessor(Qwen2VLProcessor):
    """For still images."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template)

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        """As it was, but there need be no video processor."""
        return None if argument is None else super().check_argument_for_proper_class(name, argument)
