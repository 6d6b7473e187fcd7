"""The recover stage of a run: from the cut checkpoint in the run folder to the recovered one in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from slimvlm.compress import processes
from slimvlm.compress.data.collate import collator_of
from slimvlm.compress.data.splits import Measured, Trained
from slimvlm.compress.errors import SlimvlmError
from slimvlm.compress.evaluation.equality import CHECKED_SAMPLES, reload_difference
from slimvlm.compress.files.folders import move_folder
from slimvlm.compress.models.checkpoint import Loaded
from slimvlm.compress.models.computing import as_stored, attend_as, cast, frees_memory, load_to_compute
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.options import LearnOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import Progress
from slimvlm.compress.runs import CUT, JOURNAL, MODEL, RECOVERED, TRAINING, RunFolder


@frees_memory
def recover_stage(
    run: RunFolder,
    options: LearnOptions,
    plan: Plan,
    data: Measured,
    training: Callable[[], Trained],
    progress: Progress,
) -> dict[str, Any] | None:
    """Train the cut model and put it in the place of `model/`; what it was trained from is kept as `cut/`.

    Does nothing where the same recovery is finished; goes on where it was interrupted; begins again from `cut/` where
    the options differ. Returns what was recorded (JSON), None without a recovery. Every process of the run calls it.

    Raises:
        SlimvlmError: refused; the model and the record of an earlier recovery stay.
        CheckFailedError: the merged or reloaded model differs from the trained one.
    """
    asked, earlier, folder = options.recovery_identity(), run.facts("recover"), run.path / TRAINING
    if run.finished("recover") and earlier["options"] == asked:
        return earlier
    if run.writer and earlier.get("interrupted", earlier.get("options", asked)) != asked:
        run.remove(TRAINING)  # an interrupted one, with other options
    processes.wait_for_all()
    if options.recover == "none":
        _undo_recovery(run)
        return None
    from slimvlm.compress.recovery.recover import recover  # peft and accelerate take seconds to import

    trained = training()
    start = run.path / (CUT if (run.path / CUT).is_dir() else MODEL)
    with _kept_if_refused(run, earlier, asked), run.stage("recover", options=asked) as facts:
        recovered = recover(options, plan, start, trained, folder, progress)
        facts.update(recovered.history.to_dict(), merged_difference=recovered.merged_difference)
        if recovered.blocks:
            facts["blocks"] = [asdict(block) for block in recovered.blocks]
        facts.update(samples=len(trained.training), validation_samples=len(trained.validation))
        facts.update(left_out_samples=trained.left_out, data_digest=trained.digest)
        if run.writer:
            facts["reload_difference"] = _save_recovered(run, options, plan, recovered.loaded, data)
            (folder / JOURNAL).replace(run.path / JOURNAL)
            run.remove(TRAINING)
            run.forget("evaluate")
    processes.wait_for_all()
    return run.facts("recover")


@contextmanager
def _kept_if_refused(run: RunFolder, earlier: dict[str, Any], asked: dict[str, Any]) -> Iterator[None]:
    """A recovery that is refused or broken off leaves the model of an earlier one in place, the record that says so,
    and whose training `recovery/` holds."""
    try:
        yield
    except SlimvlmError:
        if earlier.get("status") == "finished":
            run.record["stages"]["recover"] = {**earlier, "interrupted": asked}
            run.save()
        raise


def _undo_recovery(run: RunFolder) -> None:
    """Back to the cut model."""
    if run.writer and (run.path / CUT).is_dir():
        run.forget("recover")
        run.remove(MODEL)
        move_folder(run.path / CUT, run.path / MODEL)


def _save_recovered(run: RunFolder, options: LearnOptions, plan: Plan, loaded: Loaded, data: Measured) -> float:
    """Write the checkpoint, check that it reloads to the same outputs, and put it in place."""
    model, folder = loaded.model, run.path / RECOVERED
    run.remove(RECOVERED)
    save_checkpoint(folder, as_stored(model), loaded.processor, plan, plan.layout)
    asked = replace(options, device=str(model.device), stream="on" if streamed(model) else "off")
    reloaded = load_to_compute(asked, str(folder), beside=0.0).model
    attend_as(model, reloaded)
    batch = collator_of(loaded).training(data.calibration[:CHECKED_SAMPLES])
    difference = reload_difference(cast(model, reloaded.dtype), reloaded, batch, folder)
    if not (run.path / CUT).is_dir():
        move_folder(run.path / MODEL, run.path / CUT)
    run.remove(MODEL)
    move_folder(folder, run.path / MODEL)
    return difference
