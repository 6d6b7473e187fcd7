"""Attention that does not reach back to the first token: the exported cache and masks do not have it, so it is refused.

A config says so in several ways, and a field counts only where the config's own class reads it: transformers keeps
what a config.json holds besides, and a Mistral attends through its `sliding_window` whatever `use_sliding_window` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig

from slimvlm.compress.errors import UnsupportedModelError

Config = Any  # of transformers: every model type has fields of its own
FULL_ATTENTION = "full_attention"
WINDOW = re.compile(r"^(?!use_|max_|num_)(?=.*(sliding|attention|attn|local|window_size)).*(window|chunk)(?!.*pattern)")
OTHERS = ("vision_config", "audio_config", "qformer_config")  # towers whose windows are inside their graph


def refuse_windows(config: Config) -> None:
    """Raises UnsupportedModelError, naming the field, if a language model in `config` attends through windows.

    Args:
        config: of the whole model; the configs in it are looked through, those of vision and audio left out.
    """
    for path, part in _parts(config, ""):
        found = _limited(part)
        if found is not None:
            name, value = found
            raise UnsupportedModelError(
                f"{path}{name} is {value!r}: this {config.model_type} model attends through sliding windows or chunks, "
                "which the exported graphs do not keep (their answers would differ beyond the window); export a model "
                "with full attention, or use the torch checkpoint"
            )


def _parts(config: Config, path: str) -> Iterator[tuple[str, Config]]:
    """A config and those in it, each with its path."""
    yield path, config
    for name, part in vars(config).items():
        if isinstance(part, PretrainedConfig) and name not in OTHERS:
            yield from _parts(part, f"{path}{name}.")


def _limited(config: Config) -> tuple[str, object] | None:
    """The field that limits how far a token sees, and its value."""
    kinds = getattr(config, "layer_types", None) or ()
    if other := next((kind for kind in kinds if kind != FULL_ATTENTION), None):
        return "layer_types", other
    by_layer = bool(kinds) and _reads(config, "layer_types")
    switched_off = _reads(config, "use_sliding_window") and not config.use_sliding_window
    for name, value in vars(config).items():
        if WINDOW.match(name) and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            if by_layer or (switched_off and "sliding" in name):
                continue
            return name, value
    return None


def _reads(config: Config, name: str) -> bool:
    """Whether the field is one of the config's class."""
    return any(name in vars(kind).get("__annotations__", {}) for kind in type(config).__mro__)
