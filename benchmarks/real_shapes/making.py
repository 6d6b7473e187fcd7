"""A checkpoint of random weights, written shard by shard, and samples for it: never more than a shard in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from real_shapes.shapes import DTYPE, TEXT, Shape
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

SHARD = 2**30  # bytes
SPREAD = 0.02  # standard deviation of the weights, as transformers starts them
SAMPLES, QUESTION, ANSWER = 8, 12, 4  # samples by default, and words of each


def make(shape: Shape, folder: Path, samples: int = SAMPLES) -> None:
    """The checkpoint `folder/model`, with `train.jsonl` of so many samples and `val.jsonl` beside it."""
    model = folder / "model"
    model.mkdir(parents=True)
    config = shape.config()
    config.dtype = DTYPE
    with torch.device("meta"):
        empty: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=DTYPE)
    config.architectures = [type(empty).__name__]
    config.save_pretrained(model)
    _save_processor(shape, model)
    _write_weights(empty, model)
    for seed, (name, count) in enumerate({"train": samples, "val": 2}.items()):
        _write_samples(folder, name, count, shape.side, seed)


def _save_processor(shape: Shape, folder: Path) -> None:
    """The processor, and its code where it is not one of transformers'."""
    processor: Any = shape.processor()
    if not type(processor).__module__.startswith("transformers."):
        processor.register_for_auto_class()
    processor.save_pretrained(folder)


def _write_weights(empty: PreTrainedModel, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shards = list(_shards(empty))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _filled(name, empty.get_parameter(name), generator) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(DTYPE.itemsize * weight.numel() for weight in empty.parameters())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shards(empty: PreTrainedModel) -> Iterator[list[str]]:
    """Names of the parameters, tied ones once, in groups of a shard's size."""
    names: list[str] = []
    room = SHARD
    for name, weight in empty.named_parameters():
        size = DTYPE.itemsize * weight.numel()
        if names and size > room:
            yield names
            names, room = [], SHARD
        names.append(name)
        room -= size
    yield names


def _filled(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Ones for norms, zeros for biases, noise for what multiplies."""
    if weight.ndim == 1:
        return torch.full(weight.shape, 0.0 if name.endswith("bias") else 1.0, dtype=DTYPE)
    made = torch.empty(weight.shape, dtype=DTYPE)
    flat, part = made.view(-1), 2**24
    for start in range(0, math.prod(weight.shape), part):
        piece = flat[start : start + part]
        piece.copy_(torch.empty(len(piece)).normal_(std=SPREAD, generator=generator))
    return made


def _write_samples(folder: Path, name: str, count: int, side: int, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        file = f"{name}-{number}.png"
        Image.fromarray(drawn.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / file)
        question, answer = (" ".join(drawn.choice(TEXT[2:], size)) for size in (QUESTION, ANSWER))
        rows.append(json.dumps({"image": file, "question": question, "answer": answer}))
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
