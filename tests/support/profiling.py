"""Small checkpoints to profile, and options that measure them in seconds."""

from __future__ import annotations

from pathlib import Path

from plans import random_plan
from tiny_models import tiny_model
from tiny_processors import tiny_processor

from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.serve.measuring.bench import Source
from slimvlm.serve.options import ProfileOptions


def save_pair(folder: Path, name: str = "llava") -> tuple[str, str]:
    """A dense checkpoint and the same model cut; their folders."""
    dense = tiny_model(name, "sdpa").model
    plan = random_plan(dense, 1)
    save_checkpoint(folder / "dense", dense, tiny_processor(name), None)
    save_checkpoint(folder / "slim", apply_plan(dense, plan), tiny_processor(name), plan)
    return str(folder / "dense"), str(folder / "slim")


def torch_source(folder: str) -> Source:
    """The torch backend on one thread of the CPU."""
    return Source(folder, "torch", "cpu", "cpu", 1, "auto")


def quick(out: Path, slim: str, **changes: object) -> ProfileOptions:
    """One start and few short rounds of one cell."""
    chosen = {"batch_sizes": (1,), "new_tokens": (3,), "starts": 1, "rounds": 2, "warmup": 1, "threads": 1}
    chosen |= {"decoder_tests": False}
    return ProfileOptions(slim=slim, out=out / "profile.json", **{**chosen, "device": "cpu", **changes})
