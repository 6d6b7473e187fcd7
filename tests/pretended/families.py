"""Every family on the second of two pretended GPUs, its Triton kernels interpreted. Run by test_pretended.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretended
import pytest
import torch
from pretended import Wait
from pretended_cuda import current, two_devices
from tiny_models import FACTORIES, tiny_model
from tiny_processors import tiny_image, tiny_processor

from slimvlm import pipeline
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.models import checkpoint
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.recovery.training.stepping import Stepper
from slimvlm.compress.statistics.collect import Calibration, collect

STAGES = ("plan_stage", "slice_stage", "recover_stage", "evaluate_stage")
STEPS = 7  # one of every stage of the longest recovery
INTERPRETED = ("llava", "clip")  # the kernels as Python take seconds


def job(folder: Path, name: str, **changes: Any) -> CompressOptions:
    """A tiny checkpoint with data, and options that plan, cut, refit, recover for some steps, merge and evaluate."""
    save_checkpoint(folder / "dense", tiny_model(name, "sdpa").model, None, None)
    for split, first in (("train", 0), ("val", 100)):
        lines = []
        for index in range(6):
            tiny_image(16, 16, seed=first + index).save(folder / f"{split}{index}.png")
            question = "what is it" + " red" * (index % 3)
            lines.append(json.dumps({"image": f"{split}{index}.png", "question": question, "answer": "cat"}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    options = {
        "model": str(folder / "dense"), "out": folder / "out", "data": folder / "train.jsonl", "device": "cuda:1",
        "eval_data": folder / "val.jsonl", "eval_samples": 2, "ratio": 0.2, "rounds": 1, "samples": 4, "batch_size": 4,
        "export": (), "profile": False, "steps": STEPS, "train_batch_size": 2, "validation_samples": 2, "warmup": 2,
        "rank": 2, "recall_rank": 2, "learning_rate": 1e-3, "validate_every": STEPS,
    }  # fmt: skip
    return CompressOptions(**{**options, **changes})


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[list[Wait]]:
    """The waits in each optimiser step that this package makes, not the model's own code."""
    found: list[list[Wait]] = []
    plain = Stepper.__call__

    def watched(stepper: Stepper, *args: Any) -> Any:
        before = len(pretended.waits)
        outcome = plain(stepper, *args)
        found.append([wait for wait in pretended.waits[before:] if wait.ours])
        return outcome

    monkeypatch.setattr(Stepper, "__call__", watched)
    return found


def weighed(stage: Callable[..., Any], left: dict[str, int]) -> Callable[..., Any]:
    """The stage, which notes what it leaves on the devices: in use, or kept by torch."""

    def run(*args: Any) -> Any:
        made = stage(*args)
        left[stage.__name__] = sum(torch.cuda.memory_reserved(index) for index in range(torch.cuda.device_count()))
        return made

    return run


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.usefixtures("undrawn")
def test_the_whole_job_stays_on_the_second_device(name, tmp_path, monkeypatch, steps) -> None:
    # Some processors can be built without torchvision but neither saved nor loaded.
    processor = tiny_processor(name)
    monkeypatch.setattr(type(processor), "save_pretrained", lambda *_: None)
    monkeypatch.setattr(checkpoint, "load_processor", lambda *_: processor)
    options = job(tmp_path, name)
    left: dict[str, int] = {}
    for stage in STAGES:
        monkeypatch.setattr(pipeline, stage, weighed(getattr(pipeline, stage), left))
    with two_devices():
        result = pipeline.compress(options)
        assert current == [1]
    assert result.recovery["steps"] == STEPS and result.recovery["skipped"] == 0
    assert [[wait.what for wait in waits] for waits in steps] == [["tolist"]] * STEPS, steps[0]
    assert left == dict.fromkeys(STAGES, 0)
    slim = load_model(options.out / "model").model
    assert sum(weight.numel() for weight in slim.parameters()) == result.plan.parameters_after


def statistics(name: str, device: str, criterion: str) -> Calibration:
    tiny = tiny_model(name)
    model = tiny.model.to(device)
    family = find_family(model.config)
    options = CRITERIA[criterion].calibration()
    return collect(model, family, find_groups(model, family), [tiny.inputs(2)], options)


@pytest.mark.parametrize("criterion", ["gate", "ukmi", "fisher"])
@pytest.mark.parametrize("name", FACTORIES)
def test_statistics_are_those_of_the_cpu(name, criterion, monkeypatch) -> None:
    if name not in INTERPRETED:
        monkeypatch.setattr("slimvlm.kernels.dispatch.why_not_triton", lambda *_: "not in this test")
    expected = statistics(name, "cpu", criterion)
    with two_devices():
        torch.cuda.set_device(1)
        found = statistics(name, "cuda:1", criterion)
    assert found.seen.keys() == expected.seen.keys()
    for name, statistic in expected.seen.items():
        assert found.seen[name].keys() == statistic.keys()
        for key, value in statistic.items():
            if name == "angles":  # a cosine on the edge of a bin may fall on either side after fp32 rounding
                assert ((value - found.seen[name][key]).abs() < 1e-5).float().mean() > 0.9, key
            else:
                tolerance = 1e-5 * value.max().item() + 1e-12
                torch.testing.assert_close(found.seen[name][key], value, rtol=1e-4, atol=tolerance)
