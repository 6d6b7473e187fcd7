"""The plan stage of a run whose model is read block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folders import write_tiny

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.options import CompressOptions
from slimvlm.pipeline import make_plan


def options(folder: Path, out: str, **changes: object) -> CompressOptions:
    sizes = {"samples": 4, "eval_samples": 2, "rounds": 2, "batch_size": 2, "ratio": 0.2, "stream": "on"}
    model, data = str(folder / "my-vlm"), folder / "samples.jsonl"
    return CompressOptions(**{"model": model, "data": data, "out": folder / out, **sizes, **changes})  # type: ignore[arg-type]


def test_a_streamed_run_tells_how_far_it_is_and_goes_on_after_a_round_to_the_same_plan(tmp_path: Path) -> None:
    write_tiny(tmp_path, samples=8)
    told: list[tuple[object, ...]] = []
    whole = make_plan(options(tmp_path, "whole", stream="off")).plan
    plan = make_plan(options(tmp_path, "streamed"), lambda *facts: told.append(facts)).plan
    differing = sum(len(set(kept) ^ set(plan.keep[key])) for key, kept in whole.keep.items())
    assert differing <= 0.01 * sum(whole.sizes.values())  # of two units that are worth the same, either
    calibrated = [(done, total) for stage, done, total, *_ in told if stage == "calibrate"]
    there_and_back = 4 * 2 * 5  # samples, through blocks, one of which is dead and leaves
    assert calibrated[:there_and_back] == [(done, 80) for done in range(1, there_and_back + 1)]
    assert calibrated[there_and_back:] == [(done, 64) for done in range(33, 65)]

    def stop(stage: str, done: int, total: int, note: str = "", /) -> None:
        if note == "round 2 of 2" and stage == "calibrate" and done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_plan(options(tmp_path, "killed"), stop)
    assert not (tmp_path / "killed" / "plan.json").exists()
    make_plan(options(tmp_path, "killed", resume=True))
    for name in ("plan.json", "order.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()


def test_an_allocator_that_changes_weights_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    write_tiny(tmp_path, samples=8)
    with pytest.raises(UnsuitableOptionError, match="whole model at once.*--stream off"):
        make_plan(options(tmp_path, "out", allocator="ecoflap"))
