"""The published criteria by name: what each needs of the data, and where its score is computed. Read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from slimvlm.compress.statistics.rows import ALL, POORLY_FITTED, STATISTICS, CalibrationOptions, TokenRule

if TYPE_CHECKING:
    from slimvlm.compress.criteria.scoring import Score

TAYLORS = ("first", "vectorized", "second", "mix")  # statistics that take each other's place in a Taylor criterion


@dataclass(frozen=True)
class Criterion:
    """What makes a unit important. The paper's ablations are a `dataclasses.replace` of one of CRITERIA.

    Attributes:
        name: how it is called.
        statistics: what it looks at in the data, names of STATISTICS; none: it needs no data.
        tokens: those that count.
        angles: the statistic whose entropy multiplies the score (language modality only); None: nothing does.
        file: of this folder; its function `score` gives a value per unit.
        normalise: makes units of different groups comparable: division by the `weights` of a unit, or by the `mean` of
            the group; None: they are.
    """

    name: str
    statistics: tuple[str, ...] = ()
    tokens: TokenRule = ALL
    angles: str | None = None
    file: str = "saliency"
    normalise: str | None = "weights"

    @property
    def units(self) -> str:
        """What leaves, and what its statistics watch: `width`, channels and heads, or `block`, whole blocks."""
        return next((STATISTICS[name].units for name in self.statistics), "width")

    @property
    def learns(self) -> bool:
        """It takes gradients: a backward pass is needed."""
        return any(STATISTICS[name].reads == "backward" for name in self.statistics)

    @property
    def score(self) -> Score:
        """`score(group, seen) -> (values [num_units], indices of the units [num_units, m])`."""
        made: Score = import_module(f"slimvlm.compress.criteria.{self.file}").score
        return made

    def calibration(self, grad_memory_bytes: int | None = None, host_sums: bool = False) -> CalibrationOptions:
        """What it wants of the data, within these bounds on memory."""
        angles = () if self.angles is None else (self.angles,)
        return CalibrationOptions((*self.statistics, *angles), self.tokens, grad_memory_bytes, host_sums)

    def facts(self) -> dict[str, object]:
        """What files say of it."""
        return {
            "name": self.name,
            "saliency": (*self.statistics, self.name)[0],
            "tokens": self.tokens.name,
            "threshold": self.tokens.threshold,
            "entropy": self.angles is not None,
        }


CRITERIA: Mapping[str, Criterion] = {
    row.name: row
    for row in (
        Criterion("ukmi", ("first",), POORLY_FITTED, "angles"),  # UKMP, AAAI 2025
        Criterion("taylor", ("first",)),  # Molchanov et al., CVPR 2019; LLM-Pruner, NeurIPS 2023
        Criterion("fisher", ("fisher",)),  # after Liu et al., ICML 2021, but weight by weight
        Criterion("gate", ("gate",)),  # Kwon et al., NeurIPS 2022
        Criterion("magnitude", file="magnitude"),  # Li et al., ICLR 2017
        Criterion("random", file="chance", normalise=None),
        Criterion("wanda-sp", ("input-norms",), file="wanda", normalise="mean"),  # An et al., FLAP, AAAI 2024
        Criterion("flap", ("fluctuation",), file="flap", normalise=None),  # An et al., FLAP, AAAI 2024
        Criterion("obs", ("obs",), normalise="mean"),  # ZipLM, NeurIPS 2023; SlimGPT, NeurIPS 2024
        Criterion("gate-obs", ("gate-obs",)),
        Criterion("influence", ("turning",), file="influence", normalise=None),  # ShortGPT, 2024
    )
}
