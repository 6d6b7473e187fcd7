"""Every field of a JSON document, gone or with another value: what a damaged or hostile file may hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

GONE = object()
DEEP: Any = json.loads("[" * 200 + "]" * 200)
VALUES = (
    *(GONE, None, True, -1, 0, 2**53, 2**64, 10**400, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x", "../..", "\ud800", "a\0b", [], [None], [[1, "a"]], {}, {"": None}, DEEP),
)

Path = tuple[str | int, ...]


def places(document: Any, path: Path = ()) -> Iterator[Path]:
    """Where the fields of a document are; of a list the first and the last entry."""
    yield path
    if isinstance(document, dict):
        for name, value in document.items():
            yield from places(value, (*path, name))
    elif isinstance(document, list):
        for index in sorted({0, len(document) - 1} if document else ()):
            yield from places(document[index], (*path, index))


def mutated(document: Any, path: Path, value: Any) -> Any:
    """A copy with `value` at `path`, or without it."""
    if not path:
        return None if value is GONE else value
    document = copy.deepcopy(document)
    *outer, last = path
    at = document
    for step in outer:
        at = at[step]
    if value is GONE:
        del at[last]
    else:
        at[last] = value
    return document


def written(document: Any) -> bytes:
    """As a file, also what is no JSON any more."""
    return json.dumps(document).encode()
