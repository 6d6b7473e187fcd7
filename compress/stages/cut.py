"""One of many cuts by a plan that is there: the stages slice and recover, in a run folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from slimvlm.compress.data.splits import Measured, Trained
from slimvlm.compress.files.writing import write_text
from slimvlm.compress.options import CutOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import Progress
from slimvlm.compress.runs import PLAN, RunFolder
from slimvlm.compress.stages.recover import recover_stage
from slimvlm.compress.stages.slice import slice_stage


def cut_by_plan(
    folder: Path,
    options: CutOptions,
    plan: Plan,
    data: Measured,
    training: Callable[[], Trained],
    progress: Progress,
) -> RunFolder:
    """Cut, fit and train; what an earlier process finished in `folder` is kept.

    Raises:
        SlimvlmError, CheckFailedError: as the stages.
    """
    asked = replace(options, out=folder, resume=True, overwrite=False)
    run = RunFolder(folder, asked.identity(), resume=True)
    with run.begun():
        if not run.finished("plan"):
            with run.stage("plan"):
                write_text(folder / PLAN, plan.to_json())
        slice_stage(run, asked, plan, data, progress)
        recover_stage(run, asked, plan, data, training, progress)
    return run
