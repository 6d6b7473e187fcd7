"""Odd records and odd images are bad samples that are counted and named; what can be converted is converted right."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fuzz_damage import RECORDS
from PIL import Image

from slimvlm.compress.data.images import BadImageError, _say_scaled, decode_image
from slimvlm.compress.data.samples import load_samples
from slimvlm.compress.errors import SampleError

GOOD = '{"image": "0.png", "question": "what", "answer": "red"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "0.png")
    return tmp_path


@pytest.mark.parametrize("record", RECORDS, ids=lambda text: text[:50].encode("ascii", "backslashreplace").decode())
def test_an_odd_record_is_at_most_one_bad_sample(folder: Path, record: str) -> None:
    file = folder / "set.jsonl"
    file.write_text(f"{GOOD}\n{record}\n{GOOD}\n")
    loaded = load_samples(file, max_bad=0.5)
    assert len(loaded.samples) + len(loaded.bad) == 3
    for bad in loaded.bad:
        assert bad.name.startswith("set.jsonl:2")
        assert len(bad.reason) < 500
        bad.reason.encode("utf-8")
    for sample in loaded.samples:
        json.dumps([turn.answers for turn in sample.turns], ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("key", ["question", "answer", "task", "vendor", "image"])
def test_half_a_character_is_a_bad_sample(folder: Path, key: str) -> None:
    record = {"image": "0.png", "question": "what", "answer": "red", key: "a\ud800"}
    (folder / "set.jsonl").write_text(f"{GOOD}\n{json.dumps(record)}\n")
    (bad,) = load_samples(folder / "set.jsonl", max_bad=0.5).bad
    assert "half a character" in bad.reason or key == "image"


def test_ragged_and_broken_rows_of_a_table_are_bad_samples(folder: Path) -> None:
    rows = ["image,caption", "0.png,red", "0.png,red,more", "0.png", "", f"0.png,{'x' * 200_000}", '0.png,"a', 'b"']
    (folder / "set.csv").write_text("\n".join(rows) + "\n")
    loaded = load_samples(folder / "set.csv", max_bad=0.9)
    assert [sample.turns[0].target for sample in loaded.samples] == ["red", "a\nb"]
    assert [bad.name for bad in loaded.bad] == ["set.csv:3", "set.csv:4", "set.csv:6"]
    assert "has 3 values; the header names 2" in loaded.bad[0].reason


def test_a_pipe_among_the_samples_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "list.jsonl")
    os.mkfifo(folder / "1.png")
    for name in ("0.txt", "1.txt"):
        (folder / name).write_text("red")
    loaded = load_samples(folder, max_bad=0.5)
    assert [bad.reason for bad in loaded.bad] == ["is not a regular file"]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RAMP = np.linspace(0, 1, 256).reshape(16, 16)
DEEP = {
    "16-bit PNG": ((RAMP * 65535).round().astype(np.uint16), "PNG"),
    "16-bit TIFF": ((RAMP * 65535).round().astype(np.uint16), "TIFF"),
    "16-bit PPM": ((RAMP * 65535).round().astype(np.uint16), "PPM"),
    "32-bit TIFF": ((RAMP * 65535).round().astype(np.int32), "TIFF"),
    "float TIFF": (RAMP.astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_grey_image_keeps_its_brightness(name: str) -> None:
    values, kind = DEEP[name]
    image = decode_image(encoded(Image.fromarray(values), kind))
    found = np.asarray(image)
    assert image.mode == "RGB"
    assert np.abs(found[..., 0].astype(float) - 255 * RAMP).max() <= 0.51
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("values", [RAMP * 255, RAMP - 0.5, RAMP * np.nan, RAMP + np.inf])
def test_a_float_image_whose_brightness_nothing_tells_is_refused(values: np.ndarray) -> None:
    with pytest.raises(BadImageError, match="accepted is 0 to 1$"):
        decode_image(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))


def test_what_is_done_to_deep_grey_images_is_said_once() -> None:
    _say_scaled.cache_clear()
    content = encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF")
    with pytest.warns(UserWarning, match="mode F are read with 1 as white") as said:
        for _ in range(3):
            decode_image(content)
    assert len(said) == 1


def test_32_bits_of_unknown_range_are_refused() -> None:
    with pytest.raises(BadImageError, match="accepted is 0 to 65535"):
        decode_image(encoded(Image.fromarray((RAMP * 1e6).astype(np.int32)), "TIFF"))


def test_bytes_of_noise_in_any_format_are_bad_images_and_nothing_else() -> None:
    """EXIF, TIFF and chunk errors come in many types; whatever Pillow raises is a bad image."""
    generator = np.random.default_rng(0)
    picture = Image.new("RGB", (24, 20), (9, 99, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    sound = [encoded(picture, kind) for kind in ("PNG", "TIFF", "GIF", "BMP", "WEBP", "PPM")]
    sound += [encoded(picture, "JPEG", exif=exif), encoded(Image.fromarray(DEEP["16-bit PNG"][0]), "TIFF")]
    for content in sound:
        for _ in range(60):
            spoiled = bytearray(content)
            for place in generator.integers(0, min(len(content), 200), generator.choice((1, 4, 20))):
                spoiled[place] = generator.integers(256)
            try:
                decode_image(bytes(spoiled))
            except BadImageError as error:
                assert "\n" not in str(error)


def test_a_truncated_image_and_a_bomb_are_bad_samples(folder: Path) -> None:
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:50])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    lines = [GOOD, GOOD.replace("0.png", "half.png"), GOOD.replace("0.png", "bomb.png")]
    (folder / "set.jsonl").write_text("\n".join(lines))
    reasons = [bad.reason for bad in load_samples(folder / "set.jsonl", max_bad=0.9).bad]
    assert "truncated or corrupt" in reasons[0]
    assert "pixels" in reasons[1]
    with pytest.raises(SampleError, match="2 of 3 samples cannot be used"):
        load_samples(folder / "set.jsonl")
