"""Discovered rows as text, in the syntax of the family table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass

from slimvlm.compress.models.discovery.discover import Discovery
from slimvlm.compress.models.families import JOINS, TEXTS, TOWERS

FILES = ("joins.py", "towers.py", "texts.py")
WIDTH = 120
STEP = "    "


def as_rows(found: Discovery) -> str:
    """The rows that the table lacks, to be pasted into joins.py, towers.py and texts.py; empty: it has all of them."""
    tables: tuple[Mapping[str, object], ...] = (JOINS, TOWERS, TEXTS)
    rows = (found.join, found.tower, found.text)
    entries = [
        f"{STEP}# {file}\n{STEP}{json.dumps(key)}: {source(row, 1, len(key) + 5)},"
        for file, table, key, row in zip(FILES, tables, found.keys, rows, strict=True)
        if key not in table
    ]
    return "\n".join(entries)


def source(value: object, depth: int = 0, before: int = 1) -> str:
    """The Python expression that makes `value`: dataclasses without what is their default, tuples, mappings, text.

    Args:
        depth: of the line that it begins on, in steps of four; before: characters on that line around it.
    """
    if is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        inside = [
            (f"{field.name}=" if field.default is not MISSING else "", getattr(value, field.name))
            for field in fields(value)
            if field.default is MISSING or getattr(value, field.name) != field.default
        ]
        return _bracketed(f"{name}(", inside, ")", depth, before)
    if isinstance(value, tuple):
        return _bracketed("(", [("", one) for one in value], ",)" if len(value) == 1 else ")", depth, before)
    if isinstance(value, Mapping):
        return _bracketed("{", [(f"{source(name)}: ", one) for name, one in value.items()], "}", depth, before)
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _bracketed(opening: str, inside: list[tuple[str, object]], closing: str, depth: int, before: int) -> str:
    short = opening + ", ".join(label + source(one) for label, one in inside) + closing
    if len(STEP) * depth + before + len(short) <= WIDTH and "\n" not in short:
        return short
    deeper = STEP * (depth + 1)
    lines = (f"{deeper}{label}{source(one, depth + 1, len(label) + 1)},\n" for label, one in inside)
    return f"{opening}\n{''.join(lines)}{STEP * depth}{closing.removeprefix(',')}"
