"""The decision rules of VLMCompression (IJCV 2026, arXiv 2604.24380), with what its study measured. No torch.

Its ratios are shares of the language model's parameters: nothing else is cut there. Figures are percentages of the
dense model's average over nine benchmarks that were kept, lowest to highest of LLaVA-1.5-7B, Bunny-3B and, where its
rows were measured, Mini-InternVL-4B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

DEPTH, WIDTH = "depth", "width"
WANTS = ("quality", "latency", "memory")
MEASURED = (0.15, 0.3, 0.45, 0.6)
LARGEST = 0.6  # from which on a smaller model is the better choice
SAFE = 0.3
FEW_DATA, STUDIED_DATA = 0.05, (33_000, 55_000)  # 5 % of the sets it trained on
BETWEEN = 0.375  # nearer to 30 % below, to 45 % above; the study has nothing in between
Kept = Mapping[float, tuple[float, float]]
UNTRAINED: Mapping[str, Kept] = {  # its table 2
    WIDTH: {0.15: (90.9, 94.7), 0.3: (73.7, 79.9), 0.45: (32.4, 47.4), 0.6: (6.8, 14.5)},
    DEPTH: {0.15: (72.2, 90.5), 0.3: (57.4, 69.2), 0.45: (34.2, 46.0), 0.6: (4.8, 11.8)},
}
PROJECTOR: Mapping[str, Kept] = {  # its figure 3
    WIDTH: {0.15: (93.9, 95.9), 0.3: (87.7, 92.0), 0.45: (79.0, 84.2), 0.6: (47.2, 66.2)},
    DEPTH: {0.15: (95.4, 98.9), 0.3: (88.0, 93.7), 0.45: (69.8, 79.0), 0.6: (47.7, 55.2)},
}
TRAINED: Mapping[str, Kept] = {  # its table 5, without the rows that are the dense model's times a constant
    DEPTH: {0.15: (98.1, 99.0), 0.3: (94.4, 96.4)},
    WIDTH: {0.45: (84.0, 90.5), 0.6: (78.1, 83.9)},
}
SPEED: Mapping[str, Mapping[float, tuple[float, float]]] = {  # times as fast as dense, its table 3
    WIDTH: {0.15: (1.06, 1.07), 0.3: (1.16, 1.24), 0.45: (1.26, 1.63), 0.6: (1.55, 1.90)},
    DEPTH: {0.15: (1.07, 1.11), 0.3: (1.19, 1.30), 0.45: (1.37, 1.79), 0.6: (1.66, 2.13)},
}
CAUTIONS = (
    "The study has no seeds and no error bars, and publishes neither learning rates nor batch sizes.",
    "Four of its rows (Mini-InternVL, recovered) are the dense scores times one constant each; they are left out here.",
    "Its recipe sft+hidden is the best in 8 of 12 cases: plain sft wins on Mini-InternVL at 30 and 45 %, by 3 points.",
    "It prunes the language model alone, per layer (first and last blocks kept), on models without grouped queries.",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """What advice is wanted for.

    Attributes:
        share: of the language model's parameters that is to go.
        samples: there are to train with; 0: none, or no time to.
        want: one of WANTS: what counts most at this size.
    """

    share: float
    samples: int
    want: str = WANTS[0]

    @property
    def nearest(self) -> float:
        """The ratio of the study that is nearest."""
        return min(MEASURED, key=lambda ratio: abs(ratio - self.share))


@dataclass(frozen=True, slots=True)
class Reason:
    """A rule that applies, by its number in the study, and what it says."""

    rule: str
    text: str


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do.

    Attributes:
        method: DEPTH (whole blocks), WIDTH (channels and heads), or None: take a smaller model.
        train: what is trained afterwards, in the words of `--train`; None: nothing.
        recipe: in the words of `--recover`.
        data_fraction: of the samples, that is enough.
    """

    method: str | None
    train: str | None
    recipe: str
    data_fraction: float
    reasons: tuple[Reason, ...]
    cautions: tuple[str, ...]

    @property
    def options(self) -> dict[str, str]:
        """The options of `slimvlm compress` that do it, by name."""
        how = {"criterion": "influence", "rounds": "1"} if self.method == DEPTH else {}
        if self.method == WIDTH:  # its local Taylor scores of one calibration
            how = {"criterion": "taylor", "allocator": "local", "rounds": "1", "compensation": "none"}
        training = {"recover": self.recipe} if self.train is None else {"recover": self.recipe, "train": self.train}
        fraction = {} if self.data_fraction == 1 or self.train is None else {"data-fraction": f"{self.data_fraction:g}"}
        return {**how, **training, **fraction}


def advise(asked: Asked) -> Advice:
    """What the study would do."""
    method, train, recipe = _way(asked)
    fraction = FEW_DATA if asked.share < 0.5 and asked.samples else 1.0
    return Advice(method, train, recipe, fraction, tuple(_reasons(asked, method, train)), tuple(_cautions(asked)))


def _way(asked: Asked) -> tuple[str | None, str | None, str]:
    if asked.share > LARGEST:
        return None, None, "none"
    if not asked.samples:
        return WIDTH, None, "none"
    if asked.share <= MEASURED[0]:
        return DEPTH, "projector", "sft"
    if asked.share <= BETWEEN or asked.want == "latency":
        return DEPTH, "lora+projector", "sft+hidden"
    return WIDTH, "lora+projector", "sft+hidden"


def _reasons(asked: Asked, method: str | None, train: str | None) -> Iterator[Reason]:
    near = asked.nearest
    at = f"at {100 * near:.0f} % of the language model"
    if method is None:
        yield Reason("R5", f"above {100 * LARGEST:.0f} % of the language model do not prune; take a smaller model")
        return
    if not asked.samples:
        yield Reason(
            "R1",
            f"without training cut widths, and at most 15 %: {_kept(UNTRAINED, WIDTH, near)} "
            f"{at}; by whole blocks {_kept(UNTRAINED, DEPTH, near)}",
        )
    elif train == "projector":
        yield Reason("R2", f"drop whole blocks and train the projector: {_kept(PROJECTOR, DEPTH, near)} {at}")
    else:
        rule, way = ("R3", "drop whole blocks") if method == DEPTH else ("R4", "cut widths")
        yield Reason(
            rule,
            f"{way}, then train LoRA and the projector by sft+hidden: {_kept(TRAINED, method, near)} {at}; with the "
            f"projector alone {_kept(PROJECTOR, method, near)}",
        )
    if asked.samples:
        enough = (
            "5 % of the data is enough below half" if asked.share < 0.5 else "from half on use all the data there is"
        )
        yield Reason("R6", f"{enough}; its 5 % were {STUDIED_DATA[0]:,} to {STUDIED_DATA[1]:,} samples")
    if asked.share > SAFE:
        yield Reason("R7", "for 90 % of the quality stay at 30 % of the language model or below")
    if asked.want == "latency":
        fast, slow = (_span(SPEED[way][near], "x") for way in (DEPTH, WIDTH))
        yield Reason("R8", f"for latency drop whole blocks: {fast} as fast as dense {at}, by widths {slow}")
    if asked.want == "memory":
        yield Reason("R9", "for memory quantise to int8 after the cut; it took 0.8 to 1.2 points more from LLaVA")
    yield Reason("R10", "ten calibration samples were enough for the study; slimvlm takes 512, which cost seconds")


def _cautions(asked: Asked) -> Iterator[str]:
    if not asked.samples and asked.share > MEASURED[0]:
        yield "Without training the study advises against more than 15 %; find samples, or remove less."
    if 0.3 < asked.share < 0.45:
        yield "Between 30 and 45 % the study measured nothing; measure whole blocks and widths."
    if 0 < asked.samples < STUDIED_DATA[0]:
        yield f"{asked.samples:,} samples are fewer than the least that the study trained on ({STUDIED_DATA[0]:,})."
    yield from CAUTIONS


def _kept(table: Mapping[str, Kept], method: str, ratio: float) -> str:
    found = table[method].get(ratio)
    return "what was kept was not measured" if found is None else f"{_span(found, '%')} was kept"


def _span(values: tuple[float, float], unit: str) -> str:
    return f"{values[0]:g} to {values[1]:g} {unit}"
