"""Is a written graph the model? Outputs against torch at two sizes of every axis, and answers against `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from slimvlm.export.running.generation import Arrays
from slimvlm.export.variants import Tolerance, Variant

AT_ONCE = 2**20  # numbers of an output that are compared at a time


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


def measure(case: Case, found: Mapping[str, np.ndarray]) -> Difference:
    """The outputs `found` against those of the case; an output of another shape counts as infinitely far."""
    absolute, relative, cosine = 0.0, 0.0, 1.0
    for name, expected in case.outputs.items():
        other = found.get(name)
        if other is None or other.shape != expected.shape:
            absolute, relative, cosine = float("inf"), float("inf"), 0.0
            break
        error, largest, likeness = _apart(expected.ravel(), other.ravel())
        absolute = float(np.maximum(absolute, error))  # NaN stays
        relative = float(np.maximum(relative, error / max(largest, 1e-6)))
        cosine = float(np.minimum(cosine, likeness))
    shapes = {name: list(array.shape) for name, array in case.feeds.items() if not name.startswith("past_key_values.1")}
    return Difference(case.what, shapes, absolute, relative, cosine)


def _apart(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float, float]:
    """Largest error, largest value that is wanted, and cosine; some numbers at a time are in double precision."""
    error = largest = 0.0
    sums = np.zeros(3)
    for at in range(0, len(wanted), AT_ONCE):
        left, right = (array[at : at + AT_ONCE].astype(np.float64) for array in (wanted, found))
        error = np.maximum(error, np.abs(left - right).max())
        largest = np.maximum(largest, np.abs(left).max())
        sums += left @ right, left @ left, right @ right
    norms = np.sqrt(sums[1]) * np.sqrt(sums[2])
    return float(error), float(largest), float(sums[0] / norms) if norms > 0 else 1.0


@dataclass(frozen=True, slots=True)
class TokenCheck:
    """Greedy answers of a runtime against torch, along torch's tokens.

    Attributes:
        equal: answers of which every token is the runtime's own choice, too.
        token_share: of the tokens.
        loss, torch_loss: mean cross-entropy of torch's answers in the runtime and in torch, nats a token.
        divergence: mean KL(torch || runtime) of the next token's probabilities along these answers, nats a token.
        max_relative, cosine: worst logits of a step, see Difference.
        long_prompt: tokens of the longest prompt; `window`: of the widest window that the model attends through, or 0.
        accuracy: right answers by the runtime's own tokens.
        forced: the answers along which both choose are not torch's, but given to it, which was read block by block.
    """

    samples: int
    equal: int
    token_share: float
    loss: float
    torch_loss: float
    divergence: float
    max_relative: float
    cosine: float
    long_prompt: int
    window: int
    accuracy: float | None
    torch_accuracy: float | None
    forced: bool = False

    def wrong(self, variant: Variant) -> str | None:
        """What is not within the variant's tolerance, if anything; where weights are rounded, logits may differ."""
        tolerance = variant.tolerance
        exact = self.max_relative <= tolerance.relative and self.cosine >= tolerance.cosine
        if not (exact or variant.is_rounded):
            return (
                f"logits of answers differ from torch (prompts of up to {self.long_prompt} tokens): relative error "
                f"{self.max_relative:.1e}, cosine {self.cosine:.6f}"
            )
        if not self.divergence <= tolerance.divergence:
            return (
                f"what comes next is {self.divergence:.3g} nats a token from what torch says, "
                f"{tolerance.divergence} are accepted"
            )
        if not self.token_share >= tolerance.agreement:
            return f"{self.token_share:.1%} of torch's tokens are its choice, {tolerance.agreement:.0%} are asked for"
        fallen = (self.torch_accuracy or 0.0) - (self.accuracy or 0.0)
        if fallen > max(tolerance.right, (2 if variant.is_rounded else 1) / self.samples) + 1e-9:
            return f"{self.accuracy:.1%} of the answers are right, in torch {self.torch_accuracy:.1%}"
        return None
