"""Scenes of one to four objects on coloured tiles, and the questions that only the picture answers.

A scene is a 2 x 2 grid: every cell has a tile colour, some cells hold an object. All objects of a scene come from one
vendor, so licences stay apart. Compositions (which object in which cell) are split by a checksum: the training stream
never sees a composition that belongs to validation or test.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from PIL import Image

from slimvlm.demo.concepts import COLOURS, CONCEPTS, NEIGHBOUR, NUMBERS, POSITIONS, TASKS
from slimvlm.demo.sources import PHOTOS, Sprites

SIDE = 48
CELL = SIDE // 2
SCALE = (0.72, 1.0)
"""Side of an object relative to its cell."""
TILT = 14.0
"""Largest rotation in degrees."""
TRAIN_MIX = {"noto": 0.42, "fluent": 0.42, PHOTOS: 0.16}
KINDS = {concept.word: concept.kind for concept in CONCEPTS}


@dataclass(frozen=True)
class Scene:
    """`objects` and `colours` of the four cells in raster order; an empty cell has no object."""

    vendor: str
    objects: tuple[str | None, ...]
    colours: tuple[str, ...]

    @property
    def composition(self) -> str:
        return ",".join(word or "-" for word in self.objects)

    @property
    def split(self) -> str:
        """`test` (10 % of all compositions), `val` (5 %) or `train`."""
        bucket = crc32(self.composition.encode()) % 20
        return "test" if bucket < 2 else "val" if bucket == 2 else "train"


@dataclass(frozen=True)
class Question:
    """One question of a `task` (see `TASKS`), its `text` and the exact `answer`."""

    task: str
    text: str
    answer: str


def sample_scene(rng: random.Random, sprites: Sprites, mix: dict[str, float], split: str) -> Scene:
    """Draw scenes until one belongs to `split`. One to four objects, weighted 1:2:3:4, all different."""
    while True:
        vendor = rng.choices(list(mix), weights=list(mix.values()))[0]
        count = rng.choices((1, 2, 3, 4), weights=(1, 2, 3, 4))[0]
        objects: list[str | None] = [None] * 4
        for cell, word in zip(rng.sample(range(4), count), rng.sample(list(sprites[vendor]), count), strict=True):
            objects[cell] = word
        scene = Scene(vendor, tuple(objects), tuple(rng.choices(list(COLOURS), k=4)))
        if scene.split == split:
            return scene


def scenes(seed: int, sprites: Sprites, mix: dict[str, float], split: str) -> Iterator[tuple[Scene, Image.Image]]:
    """An endless stream of scenes with their pictures, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng, sprites, mix, split)
        yield scene, render(rng, scene, sprites)


def render(rng: random.Random, scene: Scene, sprites: Sprites) -> Image.Image:
    """Draw the scene as SIDE x SIDE RGB: objects vary in size, tilt, place and brightness, tiles in colour."""
    image = Image.new("RGB", (SIDE, SIDE))
    for cell, (word, colour) in enumerate(zip(scene.objects, scene.colours, strict=True)):
        left, top = cell % 2 * CELL, cell // 2 * CELL
        tile = tuple(min(255, int(channel * rng.uniform(0.93, 1.05))) for channel in COLOURS[colour])
        image.paste(tile, (left, top, left + CELL, top + CELL))
        if word is None:
            continue
        size = round(CELL * rng.uniform(*SCALE))
        sprite = rng.choice(sprites[scene.vendor][word]).rotate(rng.uniform(-TILT, TILT), Image.Resampling.BICUBIC)
        sprite = sprite.resize((size, size), Image.Resampling.BOX)
        place = (left + rng.randint(0, CELL - size), top + rng.randint(0, CELL - size))
        image.paste(sprite, place, sprite)
    gain = np.array([rng.uniform(0.9, 1.1) for _ in range(3)])
    return Image.fromarray(np.clip(np.asarray(image) * gain, 0, 255).astype(np.uint8))


def questions(rng: random.Random, scene: Scene) -> list[Question]:
    """One question of every task the scene allows, in the order of `TASKS`, about cells drawn by `rng`."""
    full = [cell for cell, word in enumerate(scene.objects) if word]
    names = [word or "nothing" for word in scene.objects]
    at, kind, behind, where = (rng.choice(full) for _ in range(4))
    tile = rng.randrange(4)
    found = {
        "at": (f"what is at the {POSITIONS[at]} ?", names[at]),
        "kind": (f"what kind of thing is at the {POSITIONS[kind]} ?", KINDS[names[kind]]),
        "count": ("how many things are there ?", NUMBERS[len(full)]),
        "colour": (f"what colour is the {POSITIONS[tile]} ?", scene.colours[tile]),
        "describe": ("describe the picture .", " ".join(names)),
        "where": (f"where is the {names[where]} ?", POSITIONS[where]),
        "behind": (f"what colour is behind the {names[behind]} ?", scene.colours[behind]),
    }
    neighbours = [
        (relation, a, b)
        for relation, pairs in NEIGHBOUR.items()
        for a, b in pairs.items()
        if scene.objects[a] and scene.objects[b]
    ]
    if neighbours:
        relation, a, b = rng.choice(neighbours)
        found["rel"] = (f"what is {relation} the {names[a]} ?", names[b])
        relation, a, b = rng.choice(neighbours)
        found["kindby"] = (f"what kind of thing is {relation} the {names[a]} ?", KINDS[names[b]])
    return [Question(task, *found[task]) for task in TASKS if task in found]


def vocabulary() -> list[str]:
    """Every word that questions and answers can hold, sorted."""
    text = (
        "what is at the kind of thing how many things are there colour describe picture where behind nothing "
        "left of right of above below ? ."
    )
    words = {*text.split(), *COLOURS, *NUMBERS, *(word for name in POSITIONS for word in name.split())}
    return sorted(words | set(KINDS) | set(KINDS.values()))
