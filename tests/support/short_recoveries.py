"""Options of recoveries that take seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from slimvlm.compress.options import CompressOptions
from slimvlm.demo import MODEL, SAMPLES

SMALL = ("--train-batch-size", 8, "--validation-samples", 24)
SHORT = {"steps": 8, "train_batch_size": 8, "validation_samples": 24, "validate_every": 4, "warmup": 2}


def options_in(folder: Path, **changes: object) -> CompressOptions:
    """No calibration, few questions, eight steps."""
    options = CompressOptions(
        model=str(MODEL),
        out=folder / "out",
        data=SAMPLES / "train.jsonl",
        eval_data=SAMPLES / "val.jsonl",
        criterion="magnitude",
        rounds=1,
        samples=8,
        eval_samples=12,
        export=(),
        profile=False,
        device="cpu",
    )
    return replace(options, **{**SHORT, **changes})
