"""Values of options: amounts of memory, shares, devices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click

# 8GB, 8gb, 8G and 8GiB; G is 1000^3, GiB is 1024^3.
SIZE_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


class Size(click.ParamType):
    """An amount of memory in bytes: `8GB`, `512MiB`, or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of `value`."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
        unit = SIZE_UNITS.get(found.group(2).upper()) if found else None
        if found is None or unit is None or float(found.group(1)) * unit < 1:
            self.fail(f"{value!r} is not a size; write for example 8GB, 512MiB or a number of bytes.", param, ctx)
        return int(float(found.group(1)) * unit)


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
            self.fail(f"{value!r} is not NAME=RATIO with a ratio from 0 to below 1, as vision=0.3.", param, ctx)
        if self.names and name not in self.names:
            self.fail(f"{name!r} is not one of {', '.join(self.names)}.", param, ctx)
        return name, ratio


class Device(click.ParamType):
    """`auto`, `cpu`, `cuda` or `cuda:N`; whether it is there is known only once torch is imported."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The device's name."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            self.fail(f"{value!r} is not one of auto, cpu, cuda, cuda:N.", param, ctx)
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
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", value.strip())
        if not found:
            self.fail(f"{value!r} is not HEIGHTxWIDTH in pixels, as 224x224.", param, ctx)
        return int(found.group(1)), int(found.group(2))


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
