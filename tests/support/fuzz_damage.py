"""What is done to a file: every kind has its own ways, and all files share some."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import fuzz_values as values
import numpy as np
from PIL import Image

TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}",
    "{% if %}",
    "{{ messages[99]['role'] }}",
    "{{ messages.pop() }}{{ nothing.here }}",
    "{{ 1 // 0 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{{ messages | tojson }}",
    "",
    "no question here",
    "{{ 'a' * 1000000 }}",
    "{% generation %}{% endgeneration %}",
    "{{ messages | length + 'x' }}",
    "{{ strftime_now('\ud83d') }}",
)
RECORDS = (
    '{"image": "0.png", "question": "\\ud800", "answer": "red"}',
    '{"image": "0.png", "question": "what", "answer": "\\udfff"}',
    '{"image": "0.png", "question": ' + values.nested(values.DEEP) + ', "answer": "a"}',
    values.nested(100_000),
    '{"image": "\\ud800.png", "caption": "a"}',
    '{"image": "' + "a" * 5000 + '.png", "caption": "a"}',
    '{"image": "a\\u0000b", "caption": "a"}',
    '{"image": {"bytes": 5}, "caption": "a"}',
    '{"image": {"bytes": "text"}, "caption": "a"}',
    '{"image": {"path": 5}, "caption": "a"}',
    '{"image": 5, "caption": "a"}',
    '{"image": true, "caption": "a"}',
    '{"image": ["0.png"], "caption": "a"}',
    '{"image": {}, "caption": "a"}',
    '{"image": "0.png", "caption": NaN}',
    '{"image": "0.png", "caption": ' + "1" * 5000 + "}",
    '{"image": "0.png", "caption": 1e999}',
    '{"image": "0.png", "answers": [{"answer": null}]}',
    '{"image": "0.png", "answers": {}}',
    '{"image": "0.png", "answers": [[]]}',
    '{"image": "0.png", "question": "what", "answer": "red", "task": {"a": []}}',
    '{"image": "0.png", "question": "what", "answer": "red", "task": "\\ud800", "vendor": 1e999}',
    '{"image": "0.png", "conversations": []}',
    '{"image": "0.png", "conversations": [{"from": "human"}]}',
    '{"image": "0.png", "conversations": [{"from": [], "value": 1}]}',
    '{"image": "0.png", "messages": [{"role": "user", "content": [{"type": "text"}]}]}',
    '{"image": "0.png", "messages": [{"role": "user", "content": {"a": 1}}, {"role": "assistant", "content": "x"}]}',
    '{"image": "0.png", "turns": [{"question": "what", "answer": "red"}, {"question": "<image>", "answer": "a"}]}',
    '{"image": "0.png", "turns": [5]}',
    '{"image": "0.png", "question": "<image> <image>", "answer": "<image>"}',
    '{"image": "0.png", "question": "' + "red " * 3000 + '", "answer": "a"}',
    '{"image": "0.png", "question": "a", "answer": "' + "red " * 3000 + '"}',
    '{"image": "0.png", "question": "", "answer": " "}',
    '{"image": "../0.png", "caption": "a"}',
    '{"image": "pipe", "caption": "a"}',
    '{"image": ".", "caption": "a"}',
    "[]",
    "null",
    '"x"',
    "5",
    "{",
    "{}",
    "not json",
)


def anything(path: Path, random: Random) -> str:
    """Damage to any file."""
    ways: dict[str, Callable[[], Any]] = {
        "removed": path.unlink,
        "emptied": lambda: path.write_bytes(b""),
        "truncated": lambda: os.truncate(path, random.randrange(max(1, path.stat().st_size))),
        "bytes flipped": lambda: path.write_bytes(_flipped(path.read_bytes(), random)),
        "not UTF-8": lambda: path.write_bytes(b"\xff\xfe" + path.read_bytes()),
        "zeros": lambda: path.write_bytes(b"\0" * 1000),
        "a folder": lambda: (path.unlink(), path.mkdir()),
        "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
        "a loop of links": lambda: (path.unlink(), path.symlink_to(path.name)),
        "a dangling link": lambda: (path.unlink(), path.symlink_to("nothing")),
    }
    name = random.choice(list(ways))
    ways[name]()
    return f"{path.name} {name}"


def document(path: Path, random: Random) -> str:
    """Damage to a JSON file: a value in it, or all of it."""
    if random.random() < 0.1:
        put = random.choice((values.scalar(random), values.nested(100_000), "{", '{"a":1}{"b":2}'))
        path.write_bytes(put.encode("utf-8"))
        return f"{path.name} is {put[:40]!r}"
    before = path.read_text(encoding="utf-8")
    after = values.change(json.loads(before), random)
    path.write_text(after, encoding="utf-8")
    return f"{path.name} {_difference(json.dumps(json.loads(before)), after)}"


def records(path: Path, random: Random) -> str:
    """Damage to lines of samples."""
    lines = path.read_text(encoding="utf-8").splitlines()
    put = random.choice(RECORDS) if random.random() < 0.7 else values.change(json.loads(random.choice(lines)), random)
    if random.random() < 0.3:
        lines = [put] * len(lines)
    else:
        lines[random.randrange(len(lines))] = put
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{path.name} holds {put[:80]!r}"


def table(path: Path, random: Random) -> str:
    """Damage to comma-separated records."""
    puts = ("a,b,c,d,e,f", "0.png", '"0.png', "\0,\0", ",,,", "0.png,what," + "x" * 200_000, "\ufeff", '0.png,"a\nb",c')
    put = random.choice(puts)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines.insert(random.randrange(len(lines) + 1), put)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{path.name} holds {put[:40]!r}"


def template(path: Path, random: Random) -> str:
    """Another chat template."""
    put = random.choice(TEMPLATES)
    own = path.read_text(encoding="utf-8")
    text = random.choice((put, put + own, own + put))
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{path.name} holds {put!r}"


def weights(path: Path, random: Random) -> str:
    """Damage to a safetensors file: its header, a tensor's values, type or shape."""
    from safetensors.numpy import load_file, save_file

    if random.random() < 0.35:
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        text = values.change(json.loads(content[8 : 8 + size]), random).encode("utf-8")
        length = random.choice((len(text), len(text), len(text), 0, 2**63, len(text) + 5))
        path.write_bytes(struct.pack("<Q", length) + text + content[8 + size :])
        return f"{path.name}: header changed, {length} bytes"
    tensors = load_file(path)
    name = random.choice(sorted(tensors))
    value = tensors[name]
    ways: dict[str, Callable[[], Any]] = {
        "nan": lambda: np.full_like(value, np.nan),
        "infinity": lambda: np.where(np.arange(value.size).reshape(value.shape) == 0, np.inf, value),
        "huge": lambda: np.full_like(value, 3e38),
        "int8": lambda: value.astype(np.int8),
        "bool": lambda: value.astype(bool),
        "int64": lambda: value.astype(np.int64),
        "float64": lambda: value.astype(np.float64),
        "float16": lambda: value.astype(np.float16),
        "a row less": lambda: value[:-1],
        "a row more": lambda: np.concatenate([value, value[:1]]),
        "flat": lambda: value.reshape(-1),
        "empty": lambda: value[:0],
        "a number": lambda: value.reshape(-1)[0],
    }
    how = random.choice(["removed", "renamed", *ways])
    if how in ways:
        tensors[name] = np.ascontiguousarray(ways[how]())
    else:
        del tensors[name]
    if how == "renamed":
        tensors["x." + name] = value
    everything = random.random() < 0.1 and how in ("int8", "bool", "float64", "float16", "nan")
    if everything:
        for name in tensors:
            value = tensors[name]
            tensors[name] = np.ascontiguousarray(ways[how]())
    save_file(tensors, path, metadata=random.choice(({"format": "pt"}, {"format": "x"}, None)))
    return f"{path.name}: {'all' if everything else name} {how}"


def picture(path: Path, random: Random) -> str:
    """Another image in the place of one."""
    ways: dict[str, Callable[[], bytes]] = {
        "16-bit grey": lambda: _encoded(_array(random, np.uint16), "PNG"),
        "float TIFF": lambda: _encoded(_array(random, np.float32) / 65535, "TIFF"),
        "float TIFF of NaN": lambda: _encoded(np.full((20, 24), np.nan, np.float32), "TIFF"),
        "32-bit TIFF": lambda: _encoded(_array(random, np.int32) * 1000, "TIFF"),
        "CMYK": lambda: _encoded(Image.new("CMYK", (24, 20), (9, 200, 30, 4)), "JPEG"),
        "palette with transparency": lambda: _encoded(Image.new("P", (24, 20), 3), "PNG", transparency=3),
        "one bit": lambda: _encoded(Image.new("1", (24, 20)), "PNG"),
        "one pixel": lambda: _encoded(Image.new("RGB", (1, 1)), "PNG"),
        "a line": lambda: _encoded(Image.new("RGB", (3000, 1)), "PNG"),
        "a bomb": lambda: _encoded(Image.new("1", (20000, 20000)), "PNG"),
        "odd EXIF": lambda: _with_exif(random),
        "EXIF of noise": lambda: _encoded(Image.new("RGB", (24, 20)), "JPEG", exif=b"Exif\0\0" + random.randbytes(60)),
        "a broken TIFF": lambda: _flipped(_encoded(_array(random, np.uint16), "TIFF"), random),
        "a broken PNG": lambda: _flipped(path.read_bytes(), random),
        "a truncated JPEG": lambda: _encoded(Image.new("RGB", (240, 200)), "JPEG")[: random.randrange(600)],
        "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "a text": lambda: b"hello",
    }
    name = random.choice(list(ways))
    content = ways[name]()
    path.write_bytes(content)
    return f"{path.name} is {name}"


def adapter(folder: Path, random: Random) -> str:
    """Adapter files beside, or instead of, the weights."""
    (folder / "adapter_config.json").write_text(random.choice(('{"peft_type": "LORA", "r": 8}', "{}", "[]", "x")))
    if random.random() < 0.7:
        shutil.copyfile(folder / "model.safetensors", folder / "adapter_model.safetensors")
        if random.random() < 0.5:
            (folder / "model.safetensors").unlink()
    return "an adapter beside the weights"


DAMAGES: dict[str, Callable[[Path, Random], str]] = {
    ".json": document,
    ".jsonl": records,
    ".csv": table,
    ".jinja": template,
    ".safetensors": weights,
    ".png": picture,
}


def damage(path: Path, random: Random) -> str:
    """Damage `path` in a way that fits it, and say how."""
    fitting = DAMAGES.get(path.suffix)
    return anything(path, random) if fitting is None or random.random() < 0.12 else fitting(path, random)


def _flipped(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 3, 30))):
        if changed:
            changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def _array(random: Random, dtype: Any) -> np.ndarray:
    return np.random.default_rng(random.randrange(2**32)).integers(0, 65535, (20, 24)).astype(dtype)


def _encoded(image: Any, kind: str, **how: Any) -> bytes:
    buffer = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **how)
    return buffer.getvalue()


def _with_exif(random: Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = random.choice((0, 9, 8, 6, 65535))
    return _encoded(Image.new("RGB", (24, 20)), "JPEG", exif=_flipped(exif.tobytes(), random))


def _difference(before: str, after: str) -> str:
    start = next((place for place, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    return f"...{before[max(0, start - 40) : start + 30]!r} -> {after[max(0, start - 5) : start + 40]!r}"
