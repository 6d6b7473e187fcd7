"""Is a written graph the model? Outputs against torch at two sizes of every axis, and tokens against `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slimvlm.compress.generation import Arrays


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What is accepted of a variant: error relative to the largest output, cosine of outputs, share of equal tokens."""

    relative: float
    cosine: float
    tokens: float

    def to_dict(self) -> dict[str, float]:
        """As stored in manifest.json."""
        return asdict(self)


# fp32: what reordered sums give. fp16 and int8 are other numbers: close in direction; their tokens are counted.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 0.99999, 1.0),
    "fp16": Tolerance(5e-2, 0.999, 0.9),
    "int8": Tolerance(0.5, 0.98, 0.5),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One run of one graph in torch: what went in, what came out, and what it is."""

    graph: str
    what: str
    feeds: Arrays
    outputs: Arrays


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one case: largest absolute error, the same relative to the largest expected value, smallest cosine."""

    case: str
    shapes: dict[str, list[int]]
    max_absolute: float
    max_relative: float
    cosine: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the tolerance is kept; NaN never is."""
        return self.max_relative <= tolerance.relative and self.cosine >= tolerance.cosine

    def to_dict(self) -> dict[str, Any]:
        """As stored in manifest.json."""
        return asdict(self)


def measure(case: Case, found: Mapping[str, np.ndarray]) -> Difference:
    """The outputs `found` against those of the case; an output of another shape counts as infinitely far."""
    absolute, relative, cosine = 0.0, 0.0, 1.0
    for name, expected in case.outputs.items():
        other = found.get(name)
        if other is None or other.shape != expected.shape:
            absolute, relative, cosine = float("inf"), float("inf"), 0.0
            break
        wanted, got = expected.astype(np.float64).ravel(), other.astype(np.float64).ravel()
        error = np.abs(wanted - got).max(initial=0.0)
        absolute = float(np.maximum(absolute, error))  # NaN stays
        relative = float(np.maximum(relative, error / max(np.abs(wanted).max(initial=0.0), 1e-6)))
        cosine = float(np.minimum(cosine, _cosine(wanted, got)))
    shapes = {name: list(array.shape) for name, array in case.feeds.items() if not name.startswith("past_key_values.1")}
    return Difference(case.what, shapes, absolute, relative, cosine)


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    norms = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / norms) if norms > 0 else 1.0


@dataclass(frozen=True, slots=True)
class TokenCheck:
    """Greedy generation of a runtime against torch: rows that are equal, tokens that are equal, right answers."""

    samples: int
    equal: int
    token_share: float
    accuracy: float | None
    torch_accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """As stored in manifest.json."""
        return asdict(self)


def token_share(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> float:
    """Share of the wanted tokens that stand at the same place."""
    same = sum(left == right for row, other in zip(found, wanted, strict=True) for left, right in zip(row, other))  # noqa: B905
    return same / max(1, sum(map(len, wanted)))
