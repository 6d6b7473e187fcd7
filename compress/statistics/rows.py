"""What can be asked of the data: statistics, and the tokens that count. A row each, read without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from slimvlm.compress.errors import UnsuitableOptionError

if TYPE_CHECKING:
    from slimvlm.compress.statistics.collector import Collector


@dataclass(frozen=True)
class Statistic:
    """What a collector makes of a reading of the data.

    Attributes:
        name: of the statistic; a collector that makes several is told which.
        reads: `forward`; `backward` where a backward pass of the loss is needed too; `perturbed` where the loss is
            asked for again and again, with other weights.
        file: in the folder collectors; `collector`: the class in it.
        per_batch: squares are taken per batch, so it depends on how samples are batched.
        units: what it watches: linears, for units of `width`, or blocks, for units of `block`.
        whole: it watches the linears of a group together instead, and is read for by itself.
        draws: perturbations, each on a batch of its own where there are so many; no more batches are read.
    """

    name: str
    reads: str
    file: str
    collector: str
    per_batch: bool = False
    units: str = "width"
    whole: bool = False
    draws: int = 0

    def make(self, host: bool = False, seed: int = 0) -> Collector:
        """A collector of this statistic, its sums in `host` memory or where the weights are, its chance by `seed`."""
        file = import_module(f"slimvlm.compress.statistics.collectors.{self.file}")
        made: Collector = getattr(file, self.collector)(self, host)
        made.seed = seed
        return made


STATISTICS: Mapping[str, Statistic] = {
    row.name: row
    for row in (
        Statistic("first", "backward", "gradients", "GradientSums"),  # sum |w g|, g summed over samples
        Statistic("vectorized", "backward", "gradients", "GradientSums"),  # |sum w g|
        Statistic("second", "backward", "gradients", "GradientSums", per_batch=True),  # sum w^2 mean(g^2)
        Statistic("mix", "backward", "gradients", "GradientSums", per_batch=True),  # sum |w g - w^2 mean(g^2) / 2|
        Statistic("fisher", "backward", "gradients", "GradientSums", per_batch=True),  # sum (w g)^2
        Statistic("gate", "backward", "gates", "GateSquares"),
        Statistic("angles", "forward", "angles", "AngleHistograms"),
        Statistic("paper-angles", "forward", "angles", "AngleHistograms"),
        Statistic("input-norms", "forward", "norms", "InputNorms"),
        Statistic("fluctuation", "forward", "fluctuation", "Fluctuation"),
        Statistic("moments", "forward", "moments", "Moments"),
        Statistic("obs", "forward", "obs", "Surgeon"),
        Statistic("gate-obs", "backward", "obs", "GatedSurgeon"),
        Statistic("turning", "forward", "turning", "Turning", units="block"),
        Statistic("drift", "forward", "drift", "Drift", units="block"),
        Statistic("first-order", "backward", "sensitivity", "FirstOrder", per_batch=True, whole=True),  # sum |w g|
        Statistic("zeroth-order", "perturbed", "sensitivity", "ZerothOrder", per_batch=True, whole=True, draws=8),
    )
}


@dataclass(frozen=True)
class TokenRule:
    """Which tokens count.

    Attributes:
        name: how it is called.
        threshold: of the answers, those count whose largest probability is at most this (or the least of their sample);
            None: all.
        pool: of a sequence of image and text tokens, those that count: one of POOLS; see pools.py.
        alpha: of the pool `atv`: how many image tokens it takes beside the text.
    """

    name: str
    threshold: float | None = None
    pool: str = "all"
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(
                f"threshold {self.threshold} is no probability; choose one of 0..1, or None for all tokens"
            )


ALL = TokenRule("all")
POORLY_FITTED = TokenRule("poorly-fitted", threshold=0.4)  # UKMP's choice
POOLS = ("all", "text", "image", "atv")


def token_rule(name: str) -> TokenRule:
    """The rule of a pool by its name: `all`, `text`, `image`, `atv` (alpha 1, its paper's choice) or `atv(0.5)`.

    Raises:
        UnsuitableOptionError: there is none of this name.
    """
    found = re.fullmatch(rf"({'|'.join(POOLS)})(?:(?<=atv)\((\d+\.?\d*)\))?", name)
    if found is None:
        raise UnsuitableOptionError(
            f"--tokens {name!r} is unknown; choose one of {', '.join(POOLS)}, the last also as 'atv(ALPHA)', "
            "ALPHA a number as 0.5"
        )
    pool, alpha = found.groups()
    return TokenRule(name, pool=pool, alpha=float(alpha or 1) if pool == "atv" else 0.0)


@dataclass(frozen=True)
class CalibrationOptions:
    """What is wanted of the data, and the memory it may take.

    Attributes:
        statistics: names of STATISTICS; they share one reading of the data.
        tokens: those that count.
        grad_memory_bytes: bound on the sums held at once (None: no bound). Weights are then taken in several passes
            over the data. `second`, `fisher`, `gate` and what needs no gradient hold none.
        host_sums: keep the sums in host memory while the model is on a GPU.
        seed: of what is drawn.
    """

    statistics: tuple[str, ...]
    tokens: TokenRule = ALL
    grad_memory_bytes: int | None = None
    host_sums: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if sum(STATISTICS[name].file == "gradients" for name in self.statistics) > 1:
            raise ValueError("one sum of weights' gradients can be kept at a time; ask for the statistics in turn")
        if len(self.statistics) > 1 and any(STATISTICS[name].whole for name in self.statistics):
            raise ValueError("what is seen of whole groups has a reading of its own; ask for the statistics in turn")

    @property
    def whole(self) -> bool:
        """What is wanted is of the linears of a group together."""
        return any(STATISTICS[name].whole for name in self.statistics)
