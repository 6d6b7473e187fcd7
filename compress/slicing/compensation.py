"""What the weights that stay become when others leave: the compensations by name. Read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any  # what the function of a row is given, which says its types

if TYPE_CHECKING:
    from slimvlm.compress.slicing.refit import Refit


@dataclass(frozen=True)
class Compensation:
    """A row: `(model, family, groups, keep, batches, *, memory, progress) -> Refit`, see `refit.refit`.

    It reads the dense model and the calibration samples; what it gives is put into the cut model.

    Attributes:
        name: how it is called.
        description: what it does, in a line.
        place: file and function in this folder; None: the weights stay as they are.
        stand_in: the row that is taken between rounds, for one that gives a bias to projections that have none: a plan
            counts the parameters of the model it is made for, and the unmodified class cannot hold such a bias. None:
            it gives none.
    """

    name: str
    description: str
    place: tuple[str, str] | None = None
    stand_in: str | None = None

    @property
    def between(self) -> str:
        """The row that is taken between rounds."""
        return self.name if self.stand_in is None else self.stand_in

    def __call__(self, *read: Any, **bounds: Any) -> Refit | None:
        if self.place is None:
            return None
        file, function = self.place
        fitted: Refit = getattr(import_module(f"slimvlm.compress.slicing.{file}"), function)(*read, **bounds)
        return fitted


COMPENSATIONS: Mapping[str, Compensation] = {
    row.name: row
    for row in (
        Compensation("none", "The kept weights as they are."),
        Compensation("refit", "Kept columns of output projections, by least squares.", ("refit", "refit")),
        Compensation("refit+bias", "The same with a bias, everywhere.", ("refit", "refit_with_bias"), "refit"),
        Compensation("bias", "A bias in the place of the mean of what is lost.", ("bias", "give_means"), "none"),
    )
}
