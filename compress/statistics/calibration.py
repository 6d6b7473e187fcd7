"""What was asked of the data, and what was seen of it: statistics per weight matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from slimvlm.compress.criteria.criterion import Criterion
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.files.writing import load_tensors, save_tensors

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How statistics are collected.

    Attributes:
        criterion: what they are for: its saliency, token threshold, and whether angles are wanted.
        grad_memory_bytes: bound on the fp32 gradient sums held at once (None: no bound). Weights are then taken in
            several passes over the data. `second`, `fisher` and `gate` hold none.
        host_sums: keep the sums in host memory while the model is on a GPU.
        faithful: the paper's histogram, which drops cosines that rounding pushed outside [-1, 1].
        digest: identity of the samples, recorded.
    """

    criterion: Criterion
    grad_memory_bytes: int | None = None
    host_sums: bool = False
    faithful: bool = False
    digest: str = ""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was seen.

    Attributes:
        digest: identity of the samples.
        num_samples: samples that counted; `skipped_samples` had no supervised token.
        image_tokens, text_tokens: without padding; for a dual encoder image tokens are patches.
        selected_tokens: answer tokens that gave a gradient (0 for a dual encoder).
        saliency: fp32 [rows or columns] over the full tensor, keyed `path:dim`.
        entropy: fp32 [rows] in nats, keyed by path; language modality, row-cut linears.
        seconds: wall-clock time of this process.
        criterion: name of the criterion; its saliency and threshold in `variant` and `threshold`.
        micro_batch: largest number of samples in one backward pass. The squares of `second`, `mix` and `fisher` are
            taken per micro-batch, so they depend on it; the other statistics do not.
        passes: times the data was read.
    """

    digest: str
    num_samples: int
    image_tokens: int
    text_tokens: int
    selected_tokens: int
    saliency: Mapping[str, Tensor]
    entropy: Mapping[str, Tensor]
    seconds: float = 0.0
    skipped_samples: int = 0
    criterion: str = ""
    variant: str = ""
    threshold: float | None = None
    micro_batch: int = 0
    passes: int = 1
    schema: int = field(default=SCHEMA, kw_only=True)

    def save(self, path: Path) -> None:
        """Write one safetensors file (the scalars as JSON in its metadata); a reader never sees half of it."""
        tensors = {f"saliency/{key}": value for key, value in self.saliency.items()}
        tensors |= {f"entropy/{key}": value for key, value in self.entropy.items()}
        scalars = {name: value for name, value in vars(self).items() if name not in ("saliency", "entropy")}
        save_tensors(path, tensors, {"calibration": scalars})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CalibrationError: the file is missing, damaged, or of another schema.
        """
        try:
            tensors, facts = load_tensors(path)
            scalars = facts["calibration"]
        except (ValueError, KeyError) as error:
            raise CalibrationError(f"{path} is not a readable calibration file ({error}); calibrate again") from error
        if scalars.get("schema") != SCHEMA:
            raise CalibrationError(
                f"{path} has calibration schema {scalars.get('schema')}, not {SCHEMA}; calibrate again"
            )
        parts: dict[str, dict[str, Tensor]] = {"saliency": {}, "entropy": {}}
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        return cls(saliency=parts["saliency"], entropy=parts["entropy"], **scalars)
