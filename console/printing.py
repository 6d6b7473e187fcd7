"""What everything on stdout goes through: lines, tables for people, one JSON document for programs; and lines typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any  # of JSON

import click

from slimvlm.console.progress import is_first_process

WIDTH_OF_A_FILE = 120  # columns when stdout is no terminal


def print_json(document: Mapping[str, Any]) -> None:
    """The one document of `--json`, on stdout; NaN and infinity become null."""
    if is_first_process():
        click.echo(json.dumps(_finite(document), indent=2, sort_keys=True, allow_nan=False))


def print_line(text: str = "") -> None:
    """A line of the result on stdout."""
    if is_first_process():
        click.echo(text)


def print_warning(text: str) -> None:
    """A warning on stderr."""
    if is_first_process():
        click.echo(f"Warning: {text}", err=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On stdout, the same text with and without a terminal; columns of figures are right-aligned."""
    if not is_first_process():
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        is_text = all(not any(character.isdigit() for character in row[index]) for row in rows)
        table.add_column(column, justify="left" if is_text or not index else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE, markup=False, highlight=False).print(table)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def typed_lines() -> Iterator[str]:
    """Lines of stdin, each after a prompt where somebody types them."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line
