"""How many samples of a calibration go through a model at once, so that activations stay small in host memory.

Only where a batch is no part of what is measured: squares of gradients are taken per batch, and a contrastive loss
compares the samples of one. On a GPU small batches are slow, and its memory is the user's to divide (--batch-size).
"""

from __future__ import annotations

from collections.abc import Sequence

from slimvlm.compress.data.collate import Collator
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.models.checkpoint import Loaded
from slimvlm.compress.models.groups import count_parameters, find_groups
from slimvlm.compress.statistics.collect import bytes_kept
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions

LEAST = 128 * 2**20  # bytes of activations that are never too many
ACTIVATIONS = 1  # bytes of activations per parameter: a quarter of the fp32 weights


def calibration_batch(
    loaded: Loaded, collator: Collator, samples: Sequence[Sample], options: CalibrationOptions, wanted: int
) -> int:
    """Samples of a calibration batch: `wanted`, or fewer on a CPU. Follows from shapes, so the same every time."""
    model, family = loaded.model, loaded.family
    per_batch = family.contrastive or any(STATISTICS[name].per_batch for name in options.statistics)
    if model.device.type != "cpu" or per_batch:
        return wanted
    longest = max(samples, key=lambda sample: sum(len(turn.prompt) + len(turn.target) for turn in sample.turns))
    kept = bytes_kept(model, family, find_groups(model, family), collator.training([longest]), options)
    return max(1, min(wanted, max(LEAST, ACTIVATIONS * count_parameters(model)) // max(kept, 1)))
