"""The plan stage of a run whose model is read block by block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_folders import write_tiny

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models import computing
from slimvlm.compress.models.computing import bytes_to_compute, free_memory, load_to_compute, require_whole
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.options import CompressOptions
from slimvlm.pipeline import compress, make_plan


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


def test_a_guard_is_refused_before_the_model_is_read_and_leaves_no_run(tmp_path: Path) -> None:
    write_tiny(tmp_path, samples=8)
    with pytest.raises(UnsuitableOptionError, match="--guard tries cuts.*--stream off"):
        make_plan(options(tmp_path, "out", guard=True))
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_model_that_a_container_has_no_room_for_is_planned_by_block_and_refused_where_it_must_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path, samples=8)
    auto = options(tmp_path, "out", stream="auto")
    needed = bytes_to_compute(auto, auto.model, 0)
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 77\n")
    monkeypatch.setattr(computing, "CONTAINER", str(tmp_path))
    for room, by_block in ((3 * needed, False), (2 * needed, True)):
        (tmp_path / "memory.max").write_text(str(room + 1000))
        assert free_memory() == room
        assert bool(streamed(load_to_compute(auto, auto.model, beside=8).model)) is by_block
    require_whole(auto, auto.model, "this")
    (tmp_path / "memory.max").write_text(str(needed))
    require_whole(replace(auto, stream="off"), auto.model, "this")
    with pytest.raises(UnsuitableOptionError, match=r"needs all of .*my-vlm in memory, .* are free") as said:
        compress(auto)
    assert "\n" not in str(said.value) and not (tmp_path / "out").exists()
