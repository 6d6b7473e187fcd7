"""One importance per unit of every group, and which indices a unit holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from slimvlm.compress.criteria.criterion import Criterion
from slimvlm.compress.files.writing import save_tensors


@dataclass(frozen=True, eq=False)
class Scores:
    """One importance per unit, and which indices of the group each unit holds.

    Attributes:
        criterion: what made them.
        values: group key -> fp32 [num_units], finite and >= 0.
        members: group key -> int64 [num_units, m], indices of the group (channels or query heads).
    """

    criterion: Criterion
    values: Mapping[str, Tensor]
    members: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write one safetensors file; a reader never sees half of it."""
        tensors = {f"values/{key}": value for key, value in self.values.items()}
        tensors |= {f"members/{key}": value for key, value in self.members.items()}
        save_tensors(path, tensors, {"criterion": self.criterion.facts()})
