"""Ideal times of what is done, and the factors between them and those of real runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import TypedDict


@dataclass(frozen=True, slots=True, kw_only=True)
class Ideal:
    """Seconds of each resource, at the machine's own rates.

    Attributes:
        stream: blocks read from files, each time they are.
        trace: operations of an export's graphs; `pack`: their weights, in fp32.
    """

    compute: float = 0.0
    traffic: float = 0.0
    launch: float = 0.0
    digest: float = 0.0
    read: float = 0.0
    stream: float = 0.0
    write: float = 0.0
    trace: float = 0.0
    pack: float = 0.0

    def __add__(self, other: Ideal) -> Ideal:
        return Ideal(**{name: getattr(self, name) + getattr(other, name) for name in RESOURCES})

    def times(self, share: float) -> Ideal:
        """So many of it."""
        return Ideal(**{name: share * getattr(self, name) for name in RESOURCES})


RESOURCES = tuple(field.name for field in fields(Ideal))


class Factors(TypedDict):
    """`seconds`: resource -> factor on its ideal time; `bytes`: `base`, of a process without a model, `kept`, values
    per width that a forward pass leaves for its backward pass, and `graphs`, of tracing, rewriting and checking graphs
    whose weights are read one by one; `runs`: what they were fitted to.
    """

    seconds: dict[str, float]
    bytes: dict[str, float]
    runs: list[str]


@cache
def fitted() -> Factors:
    """Those of `fitted.json`."""
    found: Factors = json.loads(files(__package__).joinpath("fitted.json").read_text())
    return found
