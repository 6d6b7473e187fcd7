"""A tiny model in memory, and the same one read block by block."""

from __future__ import annotations

from pathlib import Path

from tiny_models import Tiny, tiny_model

from slimvlm.compress.models.checkpoint import stream_model
from slimvlm.compress.models.experts import together


def pair(folder: Path, name: str) -> tuple[Tiny, Tiny]:
    """The model of a family in memory, and read from the shards of a checkpoint in `folder` when it is needed."""
    tiny = tiny_model(name, "sdpa")
    with together(tiny.model):
        tiny.model.save_pretrained(folder / "dense", max_shard_size="60KB")
    return tiny, Tiny(stream_model(folder / "dense", attention="sdpa").model, tiny.inputs)
