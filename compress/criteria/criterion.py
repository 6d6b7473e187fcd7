"""What makes a unit important: the criteria by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SALIENCIES = ("first", "vectorized", "second", "mix", "fisher", "gate", "magnitude", "random")


@dataclass(frozen=True)
class Criterion:
    """What makes a unit important. The paper's ablations are a `dataclasses.replace` of one of CRITERIA.

    Attributes:
        name: how it is called.
        saliency: of a weight: `first` |w g|, `vectorized` (signed inside a row), `second` and `mix` (with curvature),
            all with g summed over samples; `fisher` (w g)^2 summed over micro-batches; `gate` (dL/dm)^2 of a unit's
            gate m, summed over examples; `magnitude` |w|; `random` none.
        threshold: tokens count whose largest probability is at most this (or the least of their sample); None: all.
        entropy: multiply by the entropy of the angles (language modality only).
    """

    name: str
    saliency: str
    threshold: float | None = None
    entropy: bool = False

    def __post_init__(self) -> None:
        if self.saliency not in SALIENCIES:
            raise ValueError(f"saliency {self.saliency!r} is unknown; choose one of {', '.join(SALIENCIES)}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(
                f"threshold {self.threshold} is no probability; choose one of 0..1, or None for all tokens"
            )


CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("ukmi", "first", threshold=0.4, entropy=True),
        Criterion("taylor", "first"),
        Criterion("fisher", "fisher"),
        Criterion("gate", "gate"),
        Criterion("magnitude", "magnitude"),
        Criterion("random", "random"),
    )
}
