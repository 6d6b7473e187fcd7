"""Everything `slimvlm compress` can be told, as data. No torch: the command line reads its defaults from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

STAGES = ("plan", "slice", "evaluate")
NOT_IDENTITY = ("out", "resume", "overwrite", "stages", "max_quality_drop")  # not what is computed


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Options of the one-shot job; the names are the command line's.

    Attributes:
        model: checkpoint folder, or a hub name.
        out: run folder.
        data: calibration samples.
        eval_data: samples for the before/after comparison; default: those of `data` that were not calibrated on.
        ratio: fraction of ALL parameters to remove.
        faithful: the paper's method to the letter: UKMI, the balanced loop with its ties and without floors, one round.
        rounds: re-calibrations on the partly cut model while the ratio grows.
        samples: calibration samples per round.
        grad_memory: bound in bytes on the gradient sums held at once; None: no bound.
        host_sums: keep gradient sums in host memory while the model is on a GPU.
        threshold, entropy, taylor: ablations; None: what the criterion says. A threshold of 1 selects all tokens.
        stages: the stages to run.
        max_quality_drop: largest accepted loss in points of the mean metric; crossing it is a failed check.
    """

    model: str
    out: Path
    data: Path
    ratio: float = 0.5
    criterion: str = "gate"
    faithful: bool = False
    allocator: str = "global"
    rounds: int = 8
    tower_ratio: Mapping[str, float] = field(default_factory=dict)
    kind_ratio: Mapping[str, float] = field(default_factory=dict)
    round_channels: int = 1
    attention_unit: str = "auto"
    layout: str = "per-layer"
    samples: int = 512
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    grad_memory: int | None = None
    host_sums: bool = False
    max_bad_samples: float = 0.01
    prefix_split: bool = False
    eval_data: Path | None = None
    eval_samples: int | None = None
    max_quality_drop: float | None = None
    trust_remote_code: bool = False
    threshold: float | None = None
    entropy: bool | None = None
    taylor: str | None = None
    resume: bool = False
    overwrite: bool = False
    stages: tuple[str, ...] = STAGES

    def resolved(self) -> CompressOptions:
        """The same options with `faithful` spelled out."""
        if not self.faithful:
            return self
        return replace(
            self, criterion="ukmi", allocator="balanced", rounds=1, attention_unit="kv-group", round_channels=1
        )

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        document = {name: value for name, value in asdict(self).items() if name not in NOT_IDENTITY}
        return {name: str(value) if isinstance(value, Path) else value for name, value in document.items()}
