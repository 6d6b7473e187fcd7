"""Images of a data folder: found inside that folder only, checked whole before use, opened as RGB. No torch."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from slimvlm.compress.errors import foreign

MAX_PIXELS = 64 * 2**20
MAX_BYTES = 256 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))


class BadImageError(ValueError):
    """One image cannot be used; the message is the reason, without the image's name."""


def resolve_image(root: Path, name: str) -> Path:
    """The file `name` of the folder `root`, with symbolic links followed.

    An absolute name is taken only if it lies inside `root`. `root/images/name` is tried when `root/name` is not there.

    Raises:
        BadImageError: the name leaves the folder, or no such file is there.
    """
    if "://" in name:
        raise BadImageError("is an address; only files of the data folder are read")
    if "\0" in name or ".." in Path(name).parts:
        raise BadImageError("the path may not contain '..'")
    home = root.resolve()
    for candidate in (root / name, root / "images" / name):
        try:
            path = candidate.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):  # ValueError: characters that no name has
            continue
        if not path.is_relative_to(home):
            raise BadImageError("lies outside the data folder")
        if not path.is_file():
            raise BadImageError("is not a regular file")
        return path
    raise BadImageError("file not found")


@contextmanager
def _decoder(what: str) -> Iterator[None]:
    """The one door to Pillow: whatever a strange file makes it raise is a BadImageError; its warnings are not ours."""
    with warnings.catch_warnings(), foreign(what, kind=BadImageError):
        warnings.simplefilter("ignore")
        yield


def _identify(content: bytes) -> Image.Image:
    try:
        with _decoder("cannot be read"):
            image = Image.open(BytesIO(content), formats=FORMATS)
    except BadImageError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise BadImageError(f"is not an image (accepted: {', '.join(FORMATS)})") from None
        raise
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"is too large: {image.width} x {image.height} pixels, at most {MAX_PIXELS} in all")
    return image


def _in_bytes(image: Image.Image) -> Image.Image:
    """The image with 8 bits a value: Pillow's own conversion of grey images of more turns them white or black.

    Raises:
        BadImageError: nothing says how bright its largest value is.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)
    low, high = float(values.min()), float(values.max())
    largest = 1 if image.mode == "F" else 65535  # 32-bit integers hold 16 of a PNG or PPM, as a rule
    if not (low >= 0 and high <= largest):
        raise BadImageError(f"has values from {low:g} to {high:g} in mode {image.mode}; accepted is 0 to {largest}")
    _say_scaled(image.mode, largest)
    return Image.fromarray((values * (255 / largest)).round().astype(np.uint8))


@cache
def _say_scaled(mode: str, largest: int) -> None:
    """Once per kind and process; Python's own "once" forgets whenever warnings are caught."""
    warnings.warn(f"grey images of mode {mode} are read with {largest} as white, and rounded to 8 bits", stacklevel=4)


def read_content(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        BadImageError: it cannot be read or holds more than MAX_BYTES.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BadImageError(f"is too large: {size} bytes, at most {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from error


def as_png(image: Image.Image) -> bytes:
    """The image as a file of its own."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode_image(content: bytes) -> Image.Image:
    """An RGB image of the bytes of a file, turned upright as its EXIF record says.

    Grey images of 16 bits (0 to 65535) and of floats (0 to 1) keep their brightness.

    Raises:
        BadImageError: not an image, too many pixels, truncated, or of values whose brightness nothing tells.
    """
    image = _identify(content)
    with _decoder("cannot be decoded, it is truncated or corrupt"):
        image = ImageOps.exif_transpose(image)
        image.load()
    return _in_bytes(image).convert("RGB")


def check_image(content: bytes) -> str:
    """Decode an image to the end and give the sha256 of its bytes, in hexadecimal.

    Raises:
        BadImageError: not an image, too many pixels, or truncated.
    """
    decode_image(content)
    return hashlib.sha256(content).hexdigest()
