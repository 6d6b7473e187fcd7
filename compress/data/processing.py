"""The one door to what a checkpoint brings to make inputs: its chat template, its tokenizer and its image processor.

All three are a stranger's: the template is a program that may fail or never end, the others follow files that may say
anything. Whatever they raise is a refusal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any  # as in collate.py

import torch

from slimvlm.compress.errors import CheckpointError, SampleError, foreign

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MOST_LINES = 20_000_000  # of Python: some seconds. To compile a template takes 200 a character, to render it less
TEMPLATE = "correct its chat template (chat_template.jinja), or take that of the model's publisher"


def render_chat(processor: ProcessorMixin, messages: Sequence[Mapping[str, Any]], ask: bool) -> str:
    """The text of a conversation by the processor's own template; with `ask` the next answer is opened.

    Raises:
        CheckpointError: the template fails, or does not end.
    """
    given: Any = list(messages)  # transformers annotates their contents as texts, and takes lists of parts
    with foreign(f"the chat template of {type(processor).__name__} fails", TEMPLATE), _stopped():
        text: str = processor.apply_chat_template(given, add_generation_prompt=ask, tokenize=False)
        return text


def encode(tokenizer: Callable[..., Any], text: str, **how: Any) -> Any:
    """What the tokenizer makes of a text, token types left out.

    Raises:
        CheckpointError: it fails.
    """
    with foreign(f"{type(tokenizer).__name__} cannot encode a text of {len(text)} characters", "check tokenizer.json"):
        return tokenizer(text, return_token_type_ids=False, **how)


def prepare_image(process: Callable[..., Any], who: str, **inputs: Any) -> dict[str, Any]:
    """What a processor, or its image part, makes of one image; tensors.

    Args:
        process: is called with `inputs`.
        who: the sample, for messages.

    Raises:
        SampleError: it fails.
        CheckpointError: it gives values that are not finite: its mean, deviation or scale are wrong.
    """
    name = type(process).__name__
    with foreign(
        f"{who}: {name} cannot prepare its image", "check the image and preprocessor_config.json", SampleError
    ):
        prepared = dict(process(**inputs, return_tensors="pt"))
    for key, values in prepared.items():
        if not isinstance(values, torch.Tensor):
            raise CheckpointError(f"{name} gives {key} as {type(values).__name__}, not as a tensor; it cannot be used")
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{who}: {name} gives {key} that are not finite; correct image_mean, image_std and rescale_factor in "
                "its preprocessor_config.json or processor_config.json (a deviation may not be 0)"
            )
    return prepared


class _EndlessError(Exception):
    """More lines than any template needs."""


@contextmanager
def _stopped() -> Iterator[None]:
    """Ends what runs inside after MOST_LINES lines of Python, counted by tracing: that works in every thread."""
    left = MOST_LINES

    def count(*_: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _EndlessError(f"it does not end within {MOST_LINES} steps")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
