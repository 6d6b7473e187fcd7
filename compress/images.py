"""Images of a data folder: found inside that folder only, checked whole before use, opened as RGB. No torch."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

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
        except (OSError, RuntimeError):
            continue
        if not path.is_relative_to(home):
            raise BadImageError("lies outside the data folder")
        if not path.is_file():
            raise BadImageError("is not a regular file")
        return path
    raise BadImageError("file not found")


def _identify(content: bytes) -> Image.Image:
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadImageError(f"is not an image (accepted: {', '.join(FORMATS)})") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise BadImageError(f"cannot be read: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImageError(f"is too large: {image.width} x {image.height} pixels, at most {MAX_PIXELS} in all")
    return image


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


def decode_image(content: bytes) -> Image.Image:
    """An RGB image of the bytes of a file, turned upright as its EXIF record says.

    Raises:
        BadImageError: not an image, too many pixels, or truncated.
    """
    image = _identify(content)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise BadImageError(f"cannot be decoded (truncated or corrupt): {error}") from error


def check_image(content: bytes) -> str:
    """Decode an image to the end and give the sha256 of its bytes, in hexadecimal.

    Raises:
        BadImageError: not an image, too many pixels, or truncated.
    """
    decode_image(content)
    return hashlib.sha256(content).hexdigest()
