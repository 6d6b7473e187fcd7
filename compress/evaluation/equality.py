"""Whether two models are the same: their weights bit for bit, their outputs within what rounding explains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimvlm.compress.data.questions import placed, pose, stream_through
from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.models.families import find_family

CHECKED_SAMPLES = 4  # so many samples two models are compared on
# Of logits that should be the same, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


def outputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's outputs on `batch`: logits [tokens, V], or the similarities of a dual encoder.

    Logits of padding are left out: nobody reads them, and rounding errors were seen to be 26 times larger there.
    """
    family = find_family(model.config)
    posed = pose(model, family, batch)
    with torch.inference_mode():
        output = model(**placed(posed.inputs, model.device))
    if family.contrastive:
        similar: Tensor = output.logits_per_image
        return similar
    real = posed.masks[stream_through(family, family.towers[-1])]
    assert real is not None  # collators make it
    logits: Tensor = output.logits
    return logits[real.to(logits.device)]


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest expected value (at least 1); NaN where a value is no number."""
    return ((expected - found).abs().max() / expected.abs().max().clamp(min=1)).item()


def reload_difference(
    saved: PreTrainedModel, reloaded: PreTrainedModel, batch: Mapping[str, Tensor], folder: Path
) -> float:
    """`relative_difference` of the outputs of a model and of what its checkpoint in `folder` gives: of the same weights
    and shapes, it is 0 where a device always adds in the same order.

    Raises:
        CheckFailedError: a weight is not bit for bit what was saved, or the outputs differ by more than rounding.
    """
    there = dict(reloaded.named_parameters())
    for name, weight in saved.named_parameters():
        if name not in there or there[name].dtype != weight.dtype or not torch.equal(weight, there[name]):
            raise CheckFailedError(f"{folder}: {name} is not reloaded as it was saved; please report this model")
    difference = relative_difference(outputs(saved, batch), outputs(reloaded, batch))
    if not difference <= TOLERANCE[saved.dtype]:
        raise CheckFailedError(
            f"{folder}: the outputs of the reloaded checkpoint differ from those of what was saved by {difference:.2e} "
            f"(relative; accepted {TOLERANCE[saved.dtype]:.0e}); please report this model"
        )
    return difference


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Norm of the difference, relative to that of what was expected; NaN where a value is no number.

    The measure of a merge, which computes the same in another order. On a badly cut model each fp32 forward was seen to
    be 6e-6 from fp64 by its largest value and 1.5e-6 by the norm; one wrong token in a thousand makes 1e-2 of the norm.
    """
    expected, found = expected.float(), found.float()
    return float((expected - found).norm() / expected.norm().clamp(min=1e-30))
