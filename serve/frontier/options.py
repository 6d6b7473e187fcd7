"""Everything `slimvlm frontier` can be told, as data. No torch: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.options import CutOptions
from slimvlm.export.options import ExportOptions
from slimvlm.export.variants import FULL, VARIANTS
from slimvlm.serve.fitting.goals import read_goals

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
CHOSEN_VARIANTS = (FULL, "int8", "q4")


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """Options of a frontier; the names are the command line's.

    Attributes:
        cut: how cuts are made and evaluated, and the folder; its ratio is that of the largest.
        ratios: to cut by; 0 is the dense model, which is always measured.
        variants: precisions of every cut; full precision is always measured of the dense model.
        exporter: of the ONNX graphs, as of `slimvlm export`.
        times: whether points are timed; if not, a later resume does.
        minutes: no further cut is begun that would, as dear as the dearest so far, end later; None: all are made.
        target: `NAME=AMOUNT`s to name the best artefact under.
        threads: of one operation on the CPU; None: as `slimvlm profile`.
    """

    cut: CutOptions
    ratios: tuple[float, ...] = RATIOS
    variants: tuple[str, ...] = CHOSEN_VARIANTS
    exporter: str = ExportOptions.exporter
    times: bool = True
    minutes: float | None = None
    target: tuple[str, ...] = ()
    threads: int | None = None

    @property
    def out(self) -> Path:
        """The folder."""
        return self.cut.out

    @property
    def cuts(self) -> tuple[float, ...]:
        """The ratios without the dense model's, smallest first."""
        return tuple(sorted(set(self.ratios) - {0.0}))

    def checked(self) -> FrontierOptions:
        """The same options, with the plan's ratio the largest one, and its rounds equal: its beginnings are wanted.

        Raises:
            UnsuitableOptionError: an unknown value, or nothing to cut.
        """
        if wrong := [ratio for ratio in self.ratios if not 0 <= ratio < 1]:
            raise UnsuitableOptionError(f"--ratios {wrong[0]:g}: accepted are numbers from 0 to below 1")
        if not self.cuts:
            raise UnsuitableOptionError("--ratios must name at least one ratio above 0; the dense model is not cut")
        if wrong_names := [name for name in self.variants if name not in VARIANTS]:
            raise UnsuitableOptionError(f"--variants {wrong_names[0]} is unknown; choose from {', '.join(VARIANTS)}")
        if not self.variants:
            raise UnsuitableOptionError(f"--variants must name at least one; choose from {', '.join(VARIANTS)}")
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise UnsuitableOptionError(f"--minutes {self.minutes:g}: accepted is a number above 0")
        read_goals(self.target)
        return replace(self, cut=replace(self.cut, ratio=self.cuts[-1], equal_rounds=True).resolved())

    def export(self, ratio: float, data: Path) -> ExportOptions:
        """What is written of a cut."""
        needed = self.variants if ratio else (FULL, *self.variants)
        return ExportOptions(
            variants=tuple(dict.fromkeys(needed)),
            exporter=self.exporter,
            data=data,
            seed=self.cut.seed,
            trust_remote_code=self.cut.trust_remote_code,
        )


OWN = tuple(field.name for field in fields(FrontierOptions) if field.name != "cut")
