"""A tiny checkpoint and samples for it on disk, as a user has them."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import tiny_model
from tiny_processors import tiny_image, tiny_processor

from slimvlm.compress.models.saving import save_checkpoint

ANSWERS = ("red fox", "blue cat", "a green bird", "two dogs", "house", "tree")


def write_tiny(folder: Path, name: str = "llava", samples: int = 24, first: int = 0) -> tuple[Path, Path]:
    """`my-vlm`, the tiny model of the family `name`, and `samples.jsonl` with its images, in `folder`; `first` is the
    number of the first image, whose picture no other number has.
    """
    model, data = folder / "my-vlm", folder / "samples.jsonl"
    save_checkpoint(model, tiny_model(name).model, tiny_processor(name), None)
    rows = []
    for index in range(first, first + samples):
        tiny_image(seed=index).save(folder / f"{index}.png")
        row = {"image": f"{index}.png", "question": "what is it ?", "answer": ANSWERS[index % len(ANSWERS)]}
        rows.append(json.dumps(row))
    data.write_text("\n".join(rows), encoding="utf-8")
    return model, data
