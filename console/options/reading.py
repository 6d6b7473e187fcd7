"""What a TOML or JSON file tells of options, read as the command line reads it: a choice there is one here."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any  # what a file holds, and what options of all types become

import click

from slimvlm.compress.files.decoding import MisfitError, content_of, parse, shown
from slimvlm.console.options.making import FILE_OR_FOLDER, NAME, PATH
from slimvlm.console.options.values import Count, Number


def read_document(path: Path) -> Any:
    """What the file holds: JSON by its ending, else TOML.

    Raises:
        OSError, MisfitError: it cannot be read.
    """
    content = content_of(path)
    if path.suffix == ".json":
        return parse(content)
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise MisfitError(f"it is not UTF-8 (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise MisfitError(f"it is not TOML ({error})") from None


def word(option: click.Parameter) -> str:
    """What a file calls an option: as its flag, without the dashes before it."""
    return max(option.opts, key=len).removeprefix("--").replace("_", "-")


def told_value(folder: Path, option: click.Parameter, told: object) -> Any:
    """What the command line would have to say for the value `told`; paths are as seen from `folder`.

    Raises:
        MisfitError: the option does not take it.
    """
    value: object
    if isinstance(told, Mapping):
        value = [f"{key}={one}" for key, one in told.items()]
    elif option.multiple and not isinstance(told, list):
        value = [_said(option, told)]
    elif isinstance(told, list) and option.multiple:
        value = [_said(option, one) for one in told]
    elif isinstance(told, list):
        value = ",".join(map(str, told)) or "none"
    elif isinstance(told, str) and option.type is PATH:
        value = os.path.normpath(folder / told)
    elif option.type in (FILE_OR_FOLDER, NAME):
        value = there(folder, told)
    else:
        value = _said(option, told)
    _processed(option, told, value)
    return value


def _said(option: click.Parameter, told: object) -> object:
    """A number as the command line says it: there 1.5 and infinity are no integers."""
    is_number = isinstance(told, int | float) and not isinstance(told, bool)
    return str(told) if is_number and isinstance(option.type, Count | Number) else told


def option_value(folder: Path, option: click.Parameter, told: object) -> Any:
    """A value of an option as the command line reads it; as `told_value`."""
    return _processed(option, told, told_value(folder, option, told))


def _processed(option: click.Parameter, told: object, value: object) -> Any:
    with inside(word(option)), refused(told), click.Context(click.Command(None)) as context:
        if isinstance(told, bool) and not (isinstance(option, click.Option) and option.is_flag):
            raise MisfitError(f"{shown(told)} is no value of it")
        return option.process_value(context, value)


def converted(kind: click.ParamType, told: object) -> Any:
    """A value of this kind, as the command line reads it."""
    with refused(told):
        return kind.convert(told, None, None)


@contextmanager
def refused(told: object) -> Iterator[None]:
    """What click has against a value, as what does not fit the file."""
    try:
        yield
    except click.BadParameter as wrong:
        raise MisfitError(wrong.message.rstrip(".")) from None
    except (TypeError, AttributeError):
        raise MisfitError(f"{shown(told)} is no value of it") from None


def there(folder: Path, told: object) -> object:
    """A path as seen from the file's folder; a name that is none there stays a name."""
    if not isinstance(told, str):
        return told
    path = Path(os.path.normpath(folder / told))
    return str(path) if told and path.exists() else told


def known_keys(told: object, names: Collection[str]) -> dict[str, Any]:
    """A table with its keys as Python writes them, if all are among `names`."""
    found = {name.replace("-", "_"): value for name, value in table_of(told).items()}
    if unknown := sorted(found.keys() - set(names)):
        near = get_close_matches(unknown[0], names, n=1)
        words = ", ".join(name.replace("_", "-") for name in near or sorted(names))
        meant = "the nearest is" if near else "known are"
        raise MisfitError(f"key {shown(unknown[0].replace('_', '-'))} is unknown; {meant} {words}")
    return found


def table_of(value: object) -> Mapping[str, Any]:
    """The value, if it is a table."""
    if not isinstance(value, Mapping):
        raise MisfitError(f"{shown(value)} is not a table")
    return value


@contextmanager
def inside(step: str) -> Iterator[None]:
    """Name the place in the file."""
    try:
        yield
    except MisfitError as error:
        raise error.inside(f".{step}") from None
