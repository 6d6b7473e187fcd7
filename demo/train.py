"""Train the demo model: `python -m slimvlm.demo.train --cache CACHE --out OUT` (about an hour on two cores).

Two processes of one thread each share the batch: on these small matrices that is faster than one process of two
threads. Scenes are an endless stream, drawn anew for every step.
"""

import argparse
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from slimvlm.compress.models.checkpoint import load_model
from slimvlm.demo.model import build_model, build_processor
from slimvlm.demo.packing import Batch, answer_logits, exact_matches, pack, patch_logits, patch_words
from slimvlm.demo.scenes import TRAIN_MIX, Question, Scene, questions, scenes
from slimvlm.demo.sources import Sprites, fetch, load_sprites

CHANCE = {"where": 4.0, "behind": 4.0, "rel": 2.0, "kindby": 2.0, "count": 0.2, "colour": 0.2}
"""How readily a task is asked (others 1): finding a NAMED object is learnt last, counting in the first minutes."""
DRAWS = 3
"""Question sets drawn of a scene: asking for several of its objects tells the model that their names matter."""
PROGRESS_EVERY = 500
STATE = "state.safetensors"


@dataclass(frozen=True)
class Recipe:
    """`batch` images a step over all processes, `asked` questions an image; learning rate: warm-up, then one cosine.

    `align` weighs a second loss: every projected patch names the object in its cell through the tied word embeddings.
    `early`: the last words of a question (the name of the object, the question mark) have to know the answer already.
    A run without these two knew what it saw, but after 5000 steps still did not look for the object it was asked about.
    """

    steps: int = 9000
    batch: int = 32
    asked: int = 8
    align: float = 0.3
    early: int = 2
    rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.05
    seed: int = 0
    processes: int = 2


@dataclass(frozen=True)
class Run:
    """Where a training reads and writes.

    Attributes:
        cache: the downloaded picture packages.
        out: checkpoints, progress.jsonl, and the state that the same command goes on from.
        init: checkpoint to begin with, with a new schedule.
        shape: cut checkpoint whose shape is trained from nothing: what its weights are worth is what that falls short.
        pause: stop after so many steps.
    """

    cache: Path
    out: Path
    init: Path | None = None
    shape: Path | None = None
    pause: int | None = None


def main() -> None:
    """Parse the recipe and train in as many processes as it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded picture packages")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and progress.jsonl")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--init", type=Path, default=None, help="checkpoint to go on from, with a new schedule")
    parser.add_argument("--pause", type=int, default=None, help="stop after so many steps; the same command goes on")
    parser.add_argument("--shape", type=Path, default=None, help="cut checkpoint whose shape is trained from nothing")
    options = vars(parser.parse_args())
    run = Run(**{field.name: options.pop(field.name) for field in fields(Run)})
    recipe = Recipe(**options)
    fetch(run.cache)
    run.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    mp.spawn(_process, (recipe, run), nprocs=recipe.processes)


def _process(rank: int, recipe: Recipe, run: Run) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=recipe.processes)
    sprites = load_sprites(run.cache)
    processor = build_processor()
    torch.manual_seed(recipe.seed)
    model = build_model(processor.tokenizer)
    if run.init:
        model = type(model).from_pretrained(run.init, dtype=torch.float32, attn_implementation="eager")
    if run.shape:
        cut = load_model(run.shape, dtype=torch.float32, attention="eager").model
        model = cast(LlavaForConditionalGeneration, type(cut)(cut.config))
    train(model, processor, recipe, sprites, run.out, run.pause)
    dist.destroy_process_group()


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    recipe: Recipe,
    sprites: Sprites,
    out: Path,
    pause: int | None = None,
) -> None:
    """Run the recipe in this process of the group; process 0 validates and keeps the newest checkpoint in `out`.

    It goes on from the state that an interrupted training left in `out`, with other scenes than that would have seen.
    """
    rank = dist.get_rank()
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe.decay), lr=recipe.rate, betas=(0.9, 0.98))
    first = restore_state(model, optimizer, out / STATE)
    stream = _Stream(recipe, sprites, processor, rank, first)
    held_out = stream.validation() if rank == 0 else None
    start = time.monotonic()
    last = min(recipe.steps, first + (pause or recipe.steps))
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * schedule(step, recipe)
        with torch.autocast("cpu", torch.bfloat16):
            batch, words = stream.batch()
            features = model.model.get_image_features(pixel_values=batch.pixels)
            logits, labels = answer_logits(model, batch, features)
            seen = patch_logits(model, features)
        loss = cross_entropy(logits.float(), labels)
        aligned = cross_entropy(seen.float().flatten(0, 1), words.flatten())
        (loss + recipe.align * aligned).backward()
        _average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        done = step + 1
        if held_out and (done % PROGRESS_EVERY == 0 or done in (50, last)):
            line: dict[str, Any] = {"step": done, "seconds": round(time.monotonic() - start)}
            line |= {"loss": round(loss.item(), 3), "aligned": round(aligned.item(), 3)}
            line["val"] = validate(model, held_out)
            with (out / "progress.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            model.save_pretrained(out / "last")
            processor.save_pretrained(out / "last")
            save_state(model, optimizer, done, out / STATE)


class _Stream:
    """Training batches of this process, and the fixed validation batch."""

    def __init__(self, recipe: Recipe, sprites: Sprites, processor: LlavaProcessor, rank: int, first: int = 0) -> None:
        self.recipe, self.sprites, self.tokenizer = recipe, sprites, processor.tokenizer
        seed = recipe.seed * 1000 + rank + first * 1_000_000
        self.rng = random.Random(seed + 500)
        self.scenes = scenes(seed, sprites, TRAIN_MIX, "train")

    def batch(self) -> tuple[Batch, Tensor]:
        """The questions, and the word each image patch should name [B, image tokens]."""
        drawn = [next(self.scenes) for _ in range(self.recipe.batch // self.recipe.processes)]
        asked = [choose(self.rng, scene, self.recipe.asked) for scene, _ in drawn]
        words = patch_words([scene for scene, _ in drawn], self.tokenizer)
        return pack([image for _, image in drawn], asked, self.tokenizer, self.recipe.early), words

    def validation(self, images: int = 160) -> tuple[Batch, list[str]]:
        stream = scenes(self.recipe.seed + 7, self.sprites, TRAIN_MIX, "val")
        drawn = [next(stream) for _ in range(images)]
        asked = [questions(random.Random(index), scene) for index, (scene, _) in enumerate(drawn)]
        return pack([image for _, image in drawn], asked, self.tokenizer), [q.task for qs in asked for q in qs]


def choose(rng: random.Random, scene: Scene, number: int) -> list[Question]:
    """At most `number` different questions about the scene, tasks weighted by `CHANCE`."""
    pool = dict.fromkeys(question for _ in range(DRAWS) for question in questions(rng, scene))
    return sorted(pool, key=lambda q: rng.random() ** (1 / CHANCE.get(q.task, 1.0)), reverse=True)[:number]


def schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then one cosine down to 2 %."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def validate(model: LlavaForConditionalGeneration, held_out: tuple[Batch, list[str]]) -> dict[str, float]:
    """Per cent of exact answers per task, and their mean."""
    batch, tasks = held_out
    right = exact_matches(model, batch).tolist()
    hits = {task: [r for r, t in zip(right, tasks, strict=True) if t == task] for task in dict.fromkeys(tasks)}
    scores = {task: round(100 * sum(values) / len(values), 1) for task, values in hits.items()}
    return {"mean": round(sum(scores.values()) / len(scores), 1), **scores}


def save_state(model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    """The weights and AdamW's moments, of each parameter under its name."""
    held: dict[str, Tensor] = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        held[f"weight:{name}"] = parameter.detach()
        held |= {f"{key}:{name}": value for key, value in optimizer.state[parameter].items()}
    save_file(held, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def restore_state(model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """The step after which `save_state` wrote what it puts back; 0 where it never did."""
    if not path.is_file():
        return 0
    held = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(held[f"weight:{name}"])
        found = {key: held.get(f"{key}:{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if found["step"] is not None:  # an unused parameter has none
            optimizer.state[parameter] = found
    return int(held["step"])


def _parameter_groups(model: LlavaForConditionalGeneration, decay: float) -> list[dict]:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def _average_gradients(model: LlavaForConditionalGeneration) -> None:
    """One all-reduce over all gradients; an unused parameter (the CLIP pooling norm) has none anywhere."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


if __name__ == "__main__":
    main()
