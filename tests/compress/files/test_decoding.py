"""Whatever a JSON file holds, it becomes the noun asked for or an error that names the file and the field."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest

from slimvlm.compress.errors import CheckpointError, OutputError
from slimvlm.compress.files.decoding import DEEPEST, MisfitError, decode, parse, read


class Extra(TypedDict):
    count: int


@dataclass(frozen=True)
class Part:
    size: tuple[int, int] | None
    share: float

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError(f"share is {self.share}; accepted is at most 1")


@dataclass(frozen=True)
class Whole:
    name: str
    parts: Mapping[str, Part]
    kinds: tuple[Literal["a", "b"], ...]
    folder: Path | None
    extra: list[Annotated[dict[str, Any], Extra]]
    either: int | str
    anything: Any
    schema: int = 1


GOOD: dict[str, Any] = {
    "name": "é", "parts": {"x y": {"size": [1, 2], "share": 1}}, "kinds": ["a"], "folder": "a/b",
    "extra": [{"count": 1, "more": 2}], "either": "one", "anything": [{"k": None}], "schema": 1,
}  # fmt: skip


def test_what_fits_comes_back_with_the_types_that_were_annotated():
    whole = decode(parse(json.dumps(GOOD)), Whole)
    assert whole.parts == {"x y": Part((1, 2), 1)} and whole.folder == Path("a/b") and whole.kinds == ("a",)
    assert (whole.extra, whole.either, whole.anything) == (GOOD["extra"], "one", [{"k": None}])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", ..., "what: key 'name' is missing"),
        ("more", 1, "what: unknown key 'more'; known are anything, either, "),
        ("name", 1, "what.name: 1 is not of type str"),
        ("name", "\ud800", r"what.name: '\\ud800' holds half a character"),
        ("parts", [], r"what.parts: \[\] is not an object"),
        ("parts/x y/size/1", "2", r"what.parts.x y.size\[1\]: '2' is not of type int"),
        ("parts/x y/size", [1], "what.parts.x y.size: 1 entries; accepted is 2"),
        ("parts/x y/size/0", True, "True is not of type int"),
        ("parts/x y/share", True, "True is not a finite number"),
        ("parts/x y/share", 10**400, "share: 1000.* is too large"),
        ("parts/x y/share", 1.5, "what.parts.x y: share is 1.5; accepted is at most 1"),
        ("parts/x y", None, "x y: None is not an object"),
        ("kinds/0", "c", r"what.kinds\[0\]: 'c' is not one of a, b"),
        ("kinds/0", 1, r"what.kinds\[0\]: 1 is not one of a, b"),
        ("folder", "a\0b", "is no path"),
        ("extra/0/count", ..., r"what.extra\[0\]: key 'count' is missing"),
        ("extra/0/count", 2**63, r"count: 9223372036854775808 is too large"),
        ("either", None, "None is not of type int; None is not of type str"),
        ("anything", {"a": [float("inf")]}, r"what.anything.a\[0\]: inf is not a finite number"),
        ("anything", {"\ud800": 1}, "half a character"),
        ("schema", 2, "what: schema 2 is not the 1 this version reads"),
        ("schema", True, "True is not the 1|True is not of type int"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(path, value, message):
    document = json.loads(json.dumps(GOOD))
    *outer, last = (int(step) if step.isdecimal() else step for step in path.split("/"))
    at = document
    for step in outer:
        at = at[step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    with pytest.raises(MisfitError, match=message):
        decode(document, Whole, "what")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": 1} {}', "not JSON"),
        (b'{"a": "\xff"}', r"not UTF-8 \(byte 7\)"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": NaN}', "NaN, which is no JSON number"),
        (b'{"a": 1e999}', "a: inf is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"a": ' + b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1) + b"}", "nested deeper"),
        (b"null", "None is not an object"),
    ],
)
def test_text_that_is_no_document_is_refused_naming_the_file(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(OutputError, match=rf"some\.json does not fit: .*{message}.*; do this") as caught:
        read(path, dict[str, Any], OutputError, "do this")
    assert len(str(caught.value)) < 400


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**40)  # a hole
    for name, message in (("gone", "No such file"), (".", "not a file"), ("pipe", "not a file"), ("large", "accepted")):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / name, dict[str, Any])
