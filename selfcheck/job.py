"""The job on the packaged model: plan, cut and refit, ten steps of recovery, merge, reload; stage by stage."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import slimvlm
from slimvlm.compress.data.collate import collator_of
from slimvlm.compress.data.splits import read_measured, read_trained
from slimvlm.compress.evaluation.equality import CHECKED_SAMPLES, outputs, relative_error
from slimvlm.compress.models.computing import cast, load_to_compute
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.plan import Plan
from slimvlm.compress.progress import silent
from slimvlm.compress.runs import RunFolder
from slimvlm.compress.stages.plan import plan_stage
from slimvlm.compress.stages.recover import recover_stage
from slimvlm.compress.stages.slice import slice_stage
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.selfcheck.ground import Ground, full_precision
from slimvlm.selfcheck.outcome import WrongError

Facts = dict[str, Any]  # what run.json says of a stage: JSON, as the stage wrote it
RUN = "run"
STEPS = 10
SAME = 1e-3  # logits of two devices, relative, fp32


class Job:
    """A third of the demo model removed, calibrated on few samples, ten steps of the default recovery; in `name`."""

    def __init__(self, ground: Ground, name: str) -> None:
        self.options = CompressOptions(
            model=str(MODEL),
            out=ground.folder / name,
            data=SAMPLES / "train.jsonl",
            eval_data=SAMPLES / "val.jsonl",
            ratio=0.35,
            rounds=2,
            samples=32,
            eval_samples=32,
            steps=STEPS,
            warmup=2,
            validation_samples=16,
            train_batch_size=8,
            dtype="float32",
            device=str(ground.device),
            export=(),
            profile=False,
        )
        self.run = RunFolder(self.options.out, self.options.identity())
        self.data = read_measured(self.options)

    def plan(self) -> Plan:
        """Calibrate and plan."""
        with self.run.begun():
            return plan_stage(self.run, self.options, self.data, silent)

    def cut(self) -> Facts:
        """Cut and refit; what the stage measured. It compares with the masked dense model and the saved checkpoint."""
        plan = self.plan()
        with self.run.begun():
            slice_stage(self.run, self.options, plan, self.data, silent)
        return self.run.facts("slice")

    def recover(self) -> Facts:
        """Train and merge; what the stage measured. It compares the merged model with the trained and the saved one."""
        plan, training = self.plan(), partial(read_trained, self.options, self.data)
        with self.run.begun():
            recover_stage(self.run, self.options, plan, self.data, training, silent)
        return self.run.facts("recover")


def check_plan(ground: Ground) -> str:
    """Calibrate and plan."""
    ground.job = Job(ground, RUN)
    plan = ground.job.plan()
    removed = 1 - plan.parameters_after / plan.parameters_before
    return f"{removed:.1%} of {plan.parameters_before:,} parameters are to go, found in 2 rounds"


def check_slice(ground: Ground) -> str:
    """Cut and refit, each compared by the stage itself."""
    ground.need("plan")
    facts = ground.job.cut()
    return (
        f"cut = masked to {facts['masked_difference']:.1e}; the refit leaves {facts['output_lost']:.1%} of the outputs "
        f"lost, the cut {facts['output_lost_by_cut']:.1%}"
    )


def check_recovery(ground: Ground) -> str:
    """Ten steps of LPD, and the merge, compared by the stage itself."""
    ground.need("slice and refit")
    facts = ground.job.recover()
    return f"{STEPS} steps of LPD; merged = trained to {facts['merged_difference']:.1e}"


def check_reload(ground: Ground) -> str:
    """The saved model, loaded afresh on the CPU, answers as on the device."""
    ground.need("recovery")
    options = ground.job.options
    with full_precision():
        loaded = load_to_compute(options, str(options.out / "model"))
        collator = collator_of(loaded)
        batch = collator.training(ground.job.data.evaluation[:CHECKED_SAMPLES])
        found = outputs(loaded.model, batch).cpu()
    model, _ = slimvlm.load(options.out / "model")
    error = relative_error(outputs(cast(model, torch.float32), batch), found)
    if not error <= SAME:
        raise WrongError(f"its logits differ by {error:.1e} from those on the CPU, accepted is {SAME:.0e}")
    return f"slimvlm.load gives its logits to {error:.1e} on the CPU"
