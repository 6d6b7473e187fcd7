"""Values of options: numbers, paths, names, amounts of memory, shares, devices; what nothing can take is refused.

A value is Any where click hands it over: text from the command line, or a default that is one already.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from slimvlm.serve.fitting.goals import BYTES

MOST = 2**31 - 1  # of what is counted
LARGEST_SIDE = 8192  # pixels; images of more than 64 Mi pixels are not read
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes


class Count(click.IntRange):
    """A whole number from `least` to what every library counts to."""

    name = "integer"

    def __init__(self, least: int = 1, most: int | None = None) -> None:
        super().__init__(least, most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(_short(value), param, ctx)
        if number > MOST and self.max is None:
            self.fail(f"{number:.3g} is not at most {MOST}.", param, ctx)
        return number


class Number(click.FloatRange):
    """A number in a range; never NaN, which lies in every range, and never infinite."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(_short(value), param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Text(click.ParamType):
    """Any text that UTF-8 can write; of arguments that are not, the shell passes on the bytes."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            self.fail(f"{value!a} is not UTF-8.", param, ctx)
        return value


class Name(Text):
    """A folder, or a name on the hub."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name itself."""
        if fault := _path_fault(super().convert(value, param, ctx)):
            self.fail(f"{fault}.", param, ctx)
        return value


class Location(click.Path):
    """A path that can be one; with `exists` also that it is a file or a folder, and no pipe or device."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path."""
        if fault := _path_fault(Text().convert(str(value), param, ctx)):
            self.fail(f"{fault}.", param, ctx)
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self.exists and not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
            self.fail(f"{str(value)!r} is neither a file nor a folder.", param, ctx)
        return path


def _path_fault(text: str) -> str | None:
    """Why a text names nothing on any file system."""
    if not text.strip():
        return "the name is empty"
    if "\0" in text:
        return f"{text!r} holds a zero byte"
    if len(text.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in text.split("/")):
        return f"{_short(text)!r} is too long for a path: {LONGEST_NAME} bytes a name, {LONGEST_PATH} in all"
    return None


def _short(value: Any) -> Any:
    """A text short enough to be named in a message; none longer is a number."""
    return f"{value[:40]}..." if isinstance(value, str) and len(value) > 400 else value


class Size(click.ParamType):
    """An amount of memory in bytes: `8GB`, `512MiB`, or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of `value`."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
        unit = BYTES.get(found.group(2).upper()) if found else None
        if found is None or unit is None or not 1 <= (size := float(found.group(1)) * unit) < 2**63:
            self.fail(
                f"{_short(value)!r} is not a size; write for example 8GB, 512MiB or a number of bytes.", param, ctx
            )
        return int(size)


class Share(click.ParamType):
    """`NAME=RATIO`, for example `vision=0.3`.

    Args:
        names: the accepted names; none given: any, the library knows better.
    """

    name = "name=ratio"

    def __init__(self, *names: str) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The name and the ratio of `value`."""
        if isinstance(value, tuple):
            return value
        name, _, number = value.partition("=")
        try:
            ratio = float(number)
        except ValueError:
            ratio = -1.0
        if not name or not 0 <= ratio < 1:
            self.fail(f"{_short(value)!r} is not NAME=RATIO with a ratio from 0 to below 1, as vision=0.3.", param, ctx)
        if self.names and name not in self.names:
            self.fail(f"{name!r} is not one of {', '.join(self.names)}.", param, ctx)
        return name, ratio


class Device(click.ParamType):
    """`auto`, `cpu`, `cuda` or `cuda:N`; whether it is there is known only once torch is imported."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The device's name."""
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", value):
            self.fail(f"{_short(value)!r} is not one of auto, cpu, cuda, cuda:N.", param, ctx)
        return value


class Names(click.ParamType):
    """Comma-separated names: `onnx,torchscript`; the library knows which there are."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The names, in the order given; no name for `none`."""
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        return () if names == ("none",) else names


class ImageSize(click.ParamType):
    """Height and width in pixels: `224x224`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(height, width)."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", value.strip())
        if not found or max(size := (int(found.group(1)), int(found.group(2)))) > LARGEST_SIDE:
            at_most = f"as 224x224, each at most {LARGEST_SIDE}"
            self.fail(f"{_short(value)!r} is not HEIGHTxWIDTH in pixels, {at_most}.", param, ctx)
        return size


class Listed(click.ParamType):
    """Comma-separated values of another type: `1,4` or `224x224,448x448`."""

    def __init__(self, inner: click.ParamType) -> None:
        self.inner, self.name = inner, f"{inner.name}s"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        """The values, in the order given."""
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(self.inner.convert(one.strip(), param, ctx) for one in value.split(",")))


def shares(_ctx: click.Context, param: click.Parameter, pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Click callback of a repeatable `Share` option: name -> ratio."""
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        raise click.BadParameter("a name is given twice.", param=param)
    return by_name
