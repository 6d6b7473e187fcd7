"""The slice stage of a run: the cut checkpoint `model/`, checked against the masked dense model and after a reload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from slimvlm.compress.data.collate import Batch, collated, collator_of
from slimvlm.compress.data.samples import Sample
from slimvlm.compress.data.splits import Measured
from slimvlm.compress.errors import CheckFailedError
from slimvlm.compress.evaluation.equality import (
    CHECKED_SAMPLES,
    TOLERANCE,
    outputs,
    relative_difference,
    reload_difference,
)
from slimvlm.compress.models.checkpoint import Loaded
from slimvlm.compress.models.computing import (
    ComputedIn,
    as_stored,
    cast,
    frees_memory,
    give_back_memory,
    load_to_compute,
)
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.models.streaming.scratch import require_scratch
from slimvlm.compress.models.streaming.weights import HELD, streamed
from slimvlm.compress.options import PlanOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import Progress
from slimvlm.compress.runs import CUT, MODEL, RunFolder
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.slicing.cuts import matching_groups
from slimvlm.compress.slicing.depth import place
from slimvlm.compress.slicing.mask import mask_plan
from slimvlm.compress.slicing.refit import Refit
from slimvlm.compress.streaming.room import refitted_bytes

BESIDE = 2  # bytes per weight that a refit and a written shard take beside the model


@frees_memory
def slice_stage(run: RunFolder, options: PlanOptions, plan: Plan, data: Measured, progress: Progress) -> None:
    """Cut, check the cut against the masked dense model, refit what is left to it, save, and check the checkpoint.
    Every process calls it: all do the refit, the first one the rest.
    """
    if run.finished("slice"):
        return
    with run.stage("slice") as facts:
        if run.writer:
            run.remove(MODEL, CUT)  # of a process that died before it could say finished
            loaded = load_to_compute(options, options.model, beside=BESIDE)
            facts.update(save_cut(run.path / MODEL, loaded, options, plan, data.calibration, progress))
        elif COMPENSATIONS[options.compensation].place:
            _refit(load_to_compute(options, options.model, beside=BESIDE), options, plan, data.calibration, progress)


def save_cut(
    out: Path, loaded: Loaded, options: PlanOptions, plan: Plan, samples: Sequence[Sample], progress: Progress
) -> dict[str, float]:
    """Cut the dense `loaded`, refit it where the options say so, save it in `out`, and check what was done.

    Returns:
        How far the cut model is from the masked one, the saved one from that, and what the refit won.

    Raises:
        CheckFailedError: a difference is no rounding.
    """
    facts = {}
    model = loaded.model
    computed = model.dtype
    batch = collator_of(loaded).training(samples[:CHECKED_SAMPLES])
    fitted = _refit(loaded, options, plan, samples, progress)
    if fitted is not None:
        facts = {"output_lost_by_cut": fitted.lost_by_cut, "output_lost": fitted.lost}
    give_back_memory()
    facts["masked_difference"] = masked_difference(model, plan, batch)
    if fitted is not None:
        fitted.put_into(model, lambda path: place(path, loaded.family, plan))
        del fitted  # as large as what it replaced
    save_checkpoint(out, as_stored(model), loaded.processor, plan, plan.layout)
    if not facts["masked_difference"] <= TOLERANCE[torch.float32]:  # on a badly cut model that may be rounding
        dense = load_to_compute(options, options.model, beside=BESIDE).model
        facts["masked_difference"] = masked_difference(dense, plan, batch, torch.float64)
    if not facts["masked_difference"] <= TOLERANCE[torch.float32]:
        raise CheckFailedError(
            f"{out}: the cut model differs from the masked dense model by {facts['masked_difference']:.2e} "
            f"(relative, in fp64; accepted {TOLERANCE[torch.float32]:.0e}); please report this model"
        )
    reloaded = load_to_compute(options, str(out), beside=BESIDE).model
    facts["reload_difference"] = reload_difference(cast(model, computed), reloaded, batch, out)
    return facts


def _refit(
    loaded: Loaded, options: PlanOptions, plan: Plan, samples: Sequence[Sample], progress: Progress
) -> Refit | None:
    """What the weights of the dense `loaded` that stay become; None: what they are."""
    groups = matching_groups(loaded.model, loaded.family, plan)
    if COMPENSATIONS[options.compensation].between != "none" and streamed(loaded.model):
        require_scratch(refitted_bytes(loaded.model, loaded.family, loaded.model.dtype.itemsize) - HELD)
    work = collated(collator_of(loaded), samples, options.batch_size)
    return COMPENSATIONS[options.compensation](
        loaded.model, loaded.family, groups, plan.keep, work, memory=options.grad_memory, progress=progress
    )


def masked_difference(model: PreTrainedModel, plan: Plan, batch: Batch, dtype: torch.dtype = torch.float32) -> float:
    """How far the cut `model` is from the dense one with the cut units masked, relative to the largest output; both
    computed in `dtype`, whatever that of the weights. Afterwards the model is cut.
    """
    computed = model.dtype
    for parameter in model.parameters():
        if parameter.ndim < 2:  # a norm's kept scales grow with the cut, and would be rounded
            parameter.data = parameter.data.to(dtype)
    found = []
    for change in (mask_plan, apply_plan):
        change(model, plan)
        with ComputedIn(dtype):
            found.append(outputs(model, batch))
    cast(model, computed)
    return relative_difference(*found)
