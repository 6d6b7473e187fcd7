"""The pictures of the real-parts model and what is asked about them: `train`, `val`, `test` and `caption.jsonl`.

Emoji concepts are those that three vendors draw: Fluent and Noto are trained on, Twemoji is held out. The photo
cut-outs of Tux Paint are parted picture by picture. Captions are trained on and rarely have one right answer, so exact
match does not judge them: those of the test photos stand apart in `caption.jsonl`.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from slimvlm.compress.files.writing import write_text
from slimvlm.demo.sources import NPM, PHOTOS, drawing, fetch

PACKAGES = {**NPM, "groups": (NPM["emojibase"][0], "package/meta/groups.json")}
GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
CLOCKS = "time"  # a kind of 24 faces that nobody tells apart
TRAINED, UNSEEN = ("fluent", "noto"), "twemoji"
SIDE = 128
ASK = {
    "name": "What is this?",
    "kind": "What kind of thing is it?",
    "group": "Which group does it belong to?",
    "sort": "What sort of photo is this?",
    "caption": "Describe the picture.",
}
Rows = dict[str, list[dict[str, str]]]
"""split -> its questions, one JSON line each."""


@dataclass(frozen=True)
class Concept:
    """What three vendors draw: its answers by task, and the drawings by vendor."""

    answers: dict[str, str]
    drawings: dict[str, Path]


@dataclass(frozen=True)
class Photo:
    """A cut-out on transparent ground: its answers by task, and the file."""

    answers: dict[str, str]
    file: Path


def make_samples(cache: Path, out: Path) -> Rows:
    """Fetch the packages into `cache`, write the pictures and the questions to `out`; what is there is kept."""
    fetch(cache, PACKAGES)
    rows, pictures = questions(list(concepts(cache)), list(photos(cache)))
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, file in pictures.items():
        if not (out / name).exists():
            beside = out / f"{name}.part"
            on_white(Image.open(file)).save(beside, "PNG")
            beside.rename(out / name)
    for split, lines in rows.items():
        write_text(out / f"{split}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return rows


def concepts(cache: Path) -> Iterator[Concept]:
    """Every concept of `GROUPS` with a name of one or two words that all three vendors draw."""
    meta = json.loads((cache / "groups" / PACKAGES["groups"][1]).read_text(encoding="utf-8"))
    for row in json.loads((cache / "emojibase" / NPM["emojibase"][1]).read_text(encoding="utf-8")):
        group, kind = (meta[name].get(str(row.get(name[:-1]))) for name in ("groups", "subgroups"))
        label, code = row["label"], row["hexcode"].lower()
        if group not in GROUPS or kind == CLOCKS or len(label.split()) > 2 or not label.isascii():
            continue
        try:
            drawings = {vendor: drawing(cache / vendor / NPM[vendor][1], code) for vendor in (*TRAINED, UNSEEN)}
        except FileNotFoundError:
            continue
        answers = {"name": label.lower(), "kind": kind.replace("-", " "), "group": group.replace("-", " ")}
        yield Concept(answers, drawings)


def photos(cache: Path) -> Iterator[Photo]:
    """The stamps that are mostly photos, with the first line of their text; its folders are their sort."""
    root = cache / PHOTOS / "usr/share/tuxpaint/stamps"
    for file in sorted(root.rglob("*.png")):
        folders, text = file.relative_to(root).parts[:-1], file.with_suffix(".txt")
        if folders[0] in ("cartoon", "symbols") or not text.is_file() or file.stem.endswith(("_mirror", "_flip")):
            continue
        caption = text.read_text(encoding="utf-8", errors="ignore").splitlines()[0].strip().rstrip(".!")
        if caption and caption.isascii():
            yield Photo({"sort": " ".join(folders[:2]).lower(), "caption": caption.lower()}, file)


def questions(drawn: list[Concept], cut_out: list[Photo]) -> tuple[Rows, dict[str, Path]]:
    """The splits, and the file behind each image they name. A prefix of a held-out split is a fair sample of it."""
    rng, pictures = random.Random(0), dict[str, Path]()
    rows: Rows = defaultdict(list)

    def add(split: str, image: str, vendor: str, answers: dict[str, str]) -> None:
        rows[split] += [
            {"image": image, "question": ASK[task], "answer": answer, "task": task, "vendor": vendor}
            for task, answer in answers.items()
        ]

    for number, concept in enumerate(drawn):
        for vendor, file in concept.drawings.items():
            image = f"images/{vendor}-{number:04d}.png"
            pictures[image] = file
            held_out = "val" if number % 6 == 0 else "test"
            add("train" if vendor in TRAINED else held_out, image, vendor, concept.answers)
    cut_out = cut_out.copy()
    rng.shuffle(cut_out)
    for number, photo in enumerate(cut_out):
        image = f"images/{PHOTOS}-{number:04d}.png"
        pictures[image] = photo.file
        split = "test" if number % 4 == 0 else "val" if number % 12 == 1 else "train"
        add(split, image, PHOTOS, {"sort": photo.answers["sort"]})
        if split != "val":
            add("caption" if split == "test" else "train", image, PHOTOS, {"caption": photo.answers["caption"]})
    for split in rows.keys() - {"train"}:
        random.Random(split).shuffle(rows[split])
    return dict(rows), pictures


def on_white(picture: Image.Image) -> Image.Image:
    """A picture with transparency in the middle of a white square of at most `SIDE` pixels."""
    picture = picture.convert("RGBA")
    picture.thumbnail((SIDE, SIDE))
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGB")
