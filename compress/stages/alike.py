"""Several processes are one job only if all do the same with the same."""

from __future__ import annotations

from slimvlm.compress import processes
from slimvlm.compress.data.splits import Measured, Trained
from slimvlm.compress.files.writing import installed_versions
from slimvlm.compress.models.checkpoint import weight_sizes
from slimvlm.compress.options import READ, CutOptions
from slimvlm.compress.recovery.training.workers import sharded

VERSIONED = ("slimvlm", "torch", "transformers")


def require_alike(options: CutOptions, data: Measured, trained: Trained | None) -> None:
    """Find out before minutes of work whether all processes have the same options, packages, samples and weights, under
    whatever paths.

    Raises:
        UnsuitableOptionError: one has others than the first process.
        CheckpointError: weights are missing.
    """
    versions = installed_versions(VERSIONED)
    asked = {**options.identity(), **options.recovery_identity()}
    facts: dict[str, object] = {name: versions.get(name) for name in VERSIONED}
    facts |= {f"--{name.replace('_', '-')}": value for name, value in asked.items() if name not in READ}
    facts |= {"weights": weight_sizes(options.model), "samples": data.digest, "questions": len(data.evaluation)}
    if trained is not None:
        teacher = weight_sizes(options.teacher or options.model)
        facts |= {"samples to train on": trained.digest, "weights of the teacher": teacher}
        facts["FSDP in accelerate's configuration"] = sharded()  # hosts may have a file each
    processes.require_same(facts, "start all with the same command, packages and files")
