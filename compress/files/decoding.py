"""JSON to dataclasses, strictly: the annotations are the schema, and the field that does not fit is named. No torch.

Every field must be there and no other (of a TypedDict: others too); an int passes for a float, text for a path, nothing
else is converted. `Annotated[dict[str, Any], Port]` is read as a Port, and a dict for the code. Numbers are finite and
below 2^63, text can be written as UTF-8, nesting is bounded: nobody who reads on has to ask again.
"""

from __future__ import annotations

import json
import math
import stat
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar  # JSON, and annotations, which are no types to a type checker

from slimvlm.compress.errors import CheckpointError, SlimvlmError

DEEPEST = 64  # lists and objects inside each other
LARGEST_INT = 2**63
LARGEST_FILE = 2**30  # bytes
COPY = "copy or download it again"
SHOWN = 60  # characters of a wrong value

Noun = TypeVar("Noun")


class MisfitError(ValueError):
    """What does not fit; `path` leads to it from the outermost value."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why, self.path = why, ""

    def inside(self, step: str) -> MisfitError:
        """The same, seen from one level further out."""
        self.path = step + self.path
        return self

    def __str__(self) -> str:
        return f"{self.path.removeprefix('.')}: {self.why}" if self.path else self.why


def read(path: Path, wanted: type[Noun], error: type[SlimvlmError] = CheckpointError, advice: str = COPY) -> Noun:
    """A JSON file as the dataclass (or plain type) `wanted`.

    Raises:
        SlimvlmError: of the class `error`, naming file and field: it cannot be read, or does not fit.
    """
    with refused_as(path, error, advice):
        return decode(parse(content_of(path)), wanted)


@contextmanager
def refused_as(path: Path, error: type[SlimvlmError], advice: str) -> Iterator[None]:
    """Turn what goes wrong with the file `path` inside the block into an `error` that names it and says what to do."""
    try:
        yield
    except OSError as wrong:
        raise error(f"{path} cannot be read ({wrong.strerror or wrong}); {advice}") from wrong
    except ValueError as wrong:
        raise error(f"{path} does not fit: {wrong}; {advice}") from wrong


def content_of(path: Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: it cannot be read.
        MisfitError: it is a device or a pipe, or larger than any file of this kind.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise MisfitError("it is not a file")
    if found.st_size > LARGEST_FILE:
        raise MisfitError(f"it has {found.st_size} bytes; accepted are {LARGEST_FILE}")
    return path.read_bytes()


def parse(text: str | bytes) -> Any:
    """A JSON document.

    Raises:
        MisfitError: it is none, holds NaN, names a key twice, or is nested too deeply.
    """
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, parse_constant=_no_constant, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise MisfitError(f"it is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise MisfitError(f"it is nested deeper than {DEEPEST} levels") from None
    except MisfitError:
        raise
    except ValueError as error:  # also of numbers with thousands of digits
        raise MisfitError(f"it is not JSON ({error})") from None


def decode(value: Any, wanted: type[Noun], what: str = "") -> Noun:
    """A JSON value as the annotated type `wanted`: dataclasses, tuples, lists, mappings, unions, literals, paths, plain
    types, and Any. A dataclass with a default `schema` is read if it has that one, or is `upgraded` to it.

    Args:
        what: begins the path of what does not fit.

    Raises:
        MisfitError: the field that does not fit, by its path.
    """
    try:
        found: Noun = _decode(value, wanted, 0)
        return found
    except MisfitError as error:
        raise error.inside(what) from None


def decode_fields(value: Any, hints: Mapping[str, Any], what: str) -> dict[str, Any]:
    """As `decode`, of some fields of a dataclass: by name, of the types `hints`.

    Raises:
        MisfitError: as `decode`.
    """
    try:
        _require(value, Mapping, "an object")
        return _fields(value, hints, 0)
    except MisfitError as error:
        raise error.inside(what) from None


def dump(document: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """A document as JSON that `parse` and every other reader takes: None for numbers that are not finite, a question
    mark for half a character.
    """
    text = json.dumps(_finite(document), indent=indent, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="replace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    """A wrong value for a message, cut short."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _no_constant(name: str) -> Any:
    raise MisfitError(f"it holds {name}, which is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise MisfitError(f"key {next(shown(name) for name in names if names.count(name) > 1)} is there twice")
    return found


def _decode(value: Any, wanted: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise MisfitError(f"it is nested deeper than {DEEPEST} levels")
    if wanted is Any:
        return _decode(value, _kind_of(value), depth)
    origin, arguments = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return _union(value, arguments, depth)
    if hasattr(wanted, "__metadata__"):
        return _decode(value, wanted.__metadata__[0], depth)
    if origin is typing.Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):
            raise MisfitError(f"{shown(value)} is not one of {', '.join(map(str, arguments))}")
        return value
    if typing.is_typeddict(wanted):
        return _record(value, wanted, depth)
    if is_dataclass(wanted):
        return _noun(value, typing.cast(type, wanted), depth)
    if origin in (tuple, list):
        return _list(value, origin, arguments or (Any,), depth)
    if origin in (Mapping, dict):
        return _mapping(value, arguments[1] if arguments else Any, depth)
    return _plain(value, wanted)


def _kind_of(value: Any) -> Any:
    """The type that any value of this kind fits."""
    return next((kind for kind in (dict, list, str) if isinstance(value, kind)), type(value))


def _union(value: Any, kinds: tuple[Any, ...], depth: int) -> Any:
    wrong: list[MisfitError] = []
    for kind in kinds:
        try:
            return _decode(value, kind, depth)
        except MisfitError as error:
            wrong.append(error)
    real = [error for error, kind in zip(wrong, kinds, strict=True) if kind is not types.NoneType]
    raise real[0] if len(real) == 1 else MisfitError("; ".join(map(str, real)))


def _noun(value: Any, noun: type, depth: int) -> Any:
    _require(value, Mapping, "an object")
    value = getattr(noun, "upgraded", dict)(value)
    schema = getattr(noun, "__dataclass_fields__", {}).get("schema")
    if schema is not None and "schema" in value and value["schema"] != schema.default:
        raise MisfitError(f"schema {shown(value['schema'])} is not the {schema.default} this version reads")
    found = _fields(value, _hints(noun), depth)
    try:
        return noun(**found)
    except MisfitError:
        raise
    except ValueError as error:
        raise MisfitError(str(error)) from None


def _fields(value: Mapping[str, Any], hints: Mapping[str, Any], depth: int) -> dict[str, Any]:
    if unknown := sorted(name for name in value if name not in hints):
        raise MisfitError(f"unknown key {shown(unknown[0])}; known are {', '.join(sorted(hints))}")
    if missing := sorted(name for name in hints if name not in value):
        raise MisfitError(f"key {missing[0]!r} is missing")
    return {name: _step(f".{name}", value[name], kind, depth) for name, kind in hints.items()}


def _record(value: Any, wanted: Any, depth: int) -> dict[str, Any]:
    _require(value, Mapping, "an object")
    if missing := sorted(name for name in wanted.__required_keys__ if name not in value):
        raise MisfitError(f"key {missing[0]!r} is missing")
    hints = _hints(wanted)
    return {_plain(name, str): _step(f".{name}", one, hints.get(name, Any), depth) for name, one in value.items()}


def _list(value: Any, kind: type, arguments: tuple[Any, ...], depth: int) -> Any:
    _require(value, (list, tuple), "a list")
    if kind is list or arguments[-1] is ... or len(arguments) == 1:
        return kind(_step(f"[{place}]", one, arguments[0], depth) for place, one in enumerate(value))
    if len(value) != len(arguments):
        raise MisfitError(f"{len(value)} entries; accepted is {len(arguments)}")
    return tuple(_step(f"[{place}]", one, arguments[place], depth) for place, one in enumerate(value))


def _mapping(value: Any, kind: Any, depth: int) -> dict[str, Any]:
    _require(value, Mapping, "an object")
    return {_plain(name, str): _step(f".{name}", one, kind, depth) for name, one in value.items()}


def _step(step: str, value: Any, wanted: Any, depth: int) -> Any:
    try:
        return _decode(value, wanted, depth + 1)
    except MisfitError as error:
        raise error.inside(step) from None


def _plain(value: Any, wanted: Any) -> Any:
    kind: type = str if wanted is Path else wanted
    if wanted is types.NoneType:
        if value is not None:
            raise MisfitError(f"{shown(value)} is not null")
        return None
    if wanted is float:
        _require(value, (int, float), "a finite number")
        if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
            raise MisfitError(f"{shown(value)} is not a finite number")
        return value if isinstance(value, float) else _plain(value, int)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise MisfitError(f"{shown(value)} is not of type {kind.__name__}")
    if isinstance(value, int) and not -LARGEST_INT <= value < LARGEST_INT:
        raise MisfitError(f"{shown(value)} is too large")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise MisfitError(f"{shown(value)} holds half a character") from None
    if wanted is Path:
        if "\0" in value:
            raise MisfitError(f"{shown(value)} is no path")
        return Path(value)
    return value


def _require(value: Any, kinds: Any, words: str) -> None:
    if not isinstance(value, kinds):
        raise MisfitError(f"{shown(value)} is not {words}")


@cache
def _hints(noun: type) -> dict[str, Any]:
    hints = typing.get_type_hints(noun, include_extras=True)
    return {field.name: hints[field.name] for field in fields(noun) if field.init} if is_dataclass(noun) else hints
