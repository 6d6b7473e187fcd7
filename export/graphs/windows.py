"""How far back the layers of a text model see, by its config: to the first token, through a window, within a chunk.

A config says so in several ways, and a field counts only where the config's own class reads it: transformers keeps
what a config.json holds besides, and a Mistral attends through its `sliding_window` whatever `use_sliding_window` says.
What no class of transformers reads may be read by code of the model's own, in a way that nobody knows: it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from slimvlm.compress.errors import UnsupportedModelError

Config = Any  # of transformers: every model type has fields of its own
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # in a config's `layer_types`
SIZES = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}  # the field with the number of tokens
WINDOW = re.compile(r"^(?!use_|max_|num_)(?=.*(sliding|attention|attn|local|window_size)).*(window|chunk)(?!.*pattern)")
OTHERS = (
    "vision_config",
    "high_res_vision_config",
    "audio_config",
    "qformer_config",
)  # towers whose windows are inside their graph


@dataclass(frozen=True, slots=True)
class Reach:
    """What the tokens of a layer see: all before them, or the last `size` with their own, or those of their chunk."""

    kind: str = FULL
    size: int = 0


EVERYTHING = Reach()


def reaches(config: Config) -> tuple[Reach, ...]:
    """Those of a text model's layers, each once; the rule is the one by which transformers makes masks and caches.

    Raises:
        UnsupportedModelError: as of `refuse_unknown_windows`.
    """
    refuse_unknown_windows(config)
    if _reads(config, "layer_types") and config.layer_types:
        kinds = tuple(dict.fromkeys(config.layer_types))
    else:
        named = (kind for kind, field in SIZES.items() if _reads(config, field) and _size(config, field))
        kinds = (next(named, FULL) if _switched_on(config) else FULL,)
    return tuple(Reach(kind, _size(config, SIZES[kind])) if kind in SIZES else EVERYTHING for kind in kinds)


def widest_window(config: Config) -> int:
    """The tokens of the widest window or chunk of a text model's layers; 0: all see everything."""
    return max(reach.size for reach in reaches(config))


def refuse_unknown_windows(config: Config) -> None:
    """Raises UnsupportedModelError, naming the field, if a language model in `config` attends as no graph does.

    Args:
        config: of the whole model; the configs in it are looked through, those of vision and audio left out.
    """
    for path, part in _parts(config, ""):
        found = _unknown(part)
        if found is not None:
            name, value = found
            raise UnsupportedModelError(
                f"{path}{name} is {value!r}: the exported graphs attend to all tokens before, through sliding windows "
                f"or in chunks as transformers' own models do, and this {config.model_type} model says another thing "
                "(their answers would differ); use the torch checkpoint"
            )


def _parts(config: Config, path: str) -> Iterator[tuple[str, Config]]:
    """A config and those in it, each with its path."""
    yield path, config
    for name, part in vars(config).items():
        if isinstance(part, PretrainedConfig) and name not in OTHERS:
            yield from _parts(part, f"{path}{name}.")


def _unknown(config: Config) -> tuple[str, object] | None:
    """The field that limits in an unknown way how far a token sees, and its value."""
    by_layer = _reads(config, "layer_types")
    for kind in getattr(config, "layer_types", None) or ():
        if kind != FULL and not (by_layer and kind in SIZES):
            return "layer_types", kind
        if kind in SIZES and not _size(config, SIZES[kind]):
            return SIZES[kind], getattr(config, SIZES[kind], None)
    for name in vars(config):
        known = name in SIZES.values() and _reads(config, name)
        unused = by_layer or ("sliding" in name and not _switched_on(config))
        if WINDOW.match(name) and _size(config, name) and not (known or unused):
            return name, getattr(config, name)
    return None


def _size(config: Config, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _switched_on(config: Config) -> bool:
    return not _reads(config, "use_sliding_window") or bool(config.use_sliding_window)


def _reads(config: Config, name: str) -> bool:
    """Whether the field is one of the config's class."""
    return any(name in vars(kind).get("__annotations__", {}) for kind in type(config).__mro__)
