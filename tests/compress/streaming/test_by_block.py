"""Statistics of a model that is read block by block: those of the whole model, in every family."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from streaming import pair
from tiny_models import COVERING, EVERY, Tiny
from torch import nn

from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.errors import CalibrationError, UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_units
from slimvlm.compress.models.streaming.lazy import Lazy
from slimvlm.compress.progress import Progress, silent
from slimvlm.compress.rounds import Planning, plan_in_rounds
from slimvlm.compress.statistics.collect import Calibration, collect
from slimvlm.compress.statistics.reading import Batches
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions, token_rule
from slimvlm.compress.streaming import pages
from slimvlm.compress.streaming.blocks import blocks_of
from slimvlm.compress.streaming.room import waiting_bytes

OTHERS = (("input-norms", "moments", "fluctuation"), ("turning",), ("first-order",), ("fisher", "gate"))
ROUNDS = Planning(Budget(0.15), CRITERIA["gate"], rounds=2, between="refit")


def calibrate(
    tiny: Tiny, batches: Batches, *statistics: str, progress: Progress = silent, **options: Any
) -> Calibration:
    model: Any = tiny.model
    family = find_family(model.config)
    groups = find_units(model, family, STATISTICS[statistics[0]].units)
    return collect(model, family, groups, batches, CalibrationOptions(statistics, **options), progress)


def assert_same(left: Calibration, right: Calibration) -> None:
    assert (left.samples, left.selected_tokens) == (right.samples, right.selected_tokens)
    assert left.seen.keys() == right.seen.keys()
    for name, values in left.seen.items():
        assert values.keys() == right.seen[name].keys()
        for key, value in values.items():
            other = right.seen[name][key]
            if name == "angles":  # a cosine on the edge of a bin may fall on either side after fp32 rounding
                assert ((value - other).abs() < 1e-5).float().mean() > 0.95, key
            else:
                torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5 * value.max().item() + 1e-12)


def block_weights(model: nn.Module) -> list[str]:
    """Names of the parameters of blocks."""
    blocks = tuple(f"{path}." for path in blocks_of_model(model))
    return [name for name, _ in model.named_parameters() if name.startswith(blocks)]


def blocks_of_model(model: nn.Module) -> list[str]:
    return blocks_of(model, find_family(cast(Any, model).config))


def ragged(tiny: Tiny) -> list[dict[str, torch.Tensor]]:
    """Batches of which one has no sample that counts, and one a sample that does not."""
    batches = [tiny.inputs(2) for _ in range(4)]
    batches[1]["labels"][:] = -100
    batches[2]["labels"][0] = -100
    return batches


def keep(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Of what forwards hold, so many bytes stay in memory while they wait; nothing is too small to be put away."""
    monkeypatch.setattr(pages, "KEPT", size)
    monkeypatch.setattr(pages, "LEAST", 1)


@pytest.mark.parametrize("name", [*EVERY, *COVERING])
def test_statistics_and_plans_are_those_of_the_whole_model_in_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole, streamed = pair(tmp_path, name)
    batches = [whole.inputs(2)]
    wanted = ("first", "angles", "input-norms", "gate-obs")
    with monkeypatch.context() as patch:
        keep(patch, 0)  # all that forwards hold is put away wherever they wait
        assert_same(*(calibrate(one, batches, *wanted) for one in (whole, streamed)))
    left, right = (plan_in_rounds(one.model, lambda _: batches, ROUNDS).plan for one in (whole, streamed))
    assert right.sizes == left.sizes and right.keep.keys() == left.keep.keys()
    differing = sum(len(set(kept) ^ set(right.keep[key])) for key, kept in left.keep.items())
    assert differing <= 0.01 * sum(left.sizes.values())  # of two units that are worth the same, either
    assert all(isinstance(streamed.model.get_parameter(name), Lazy) for name in block_weights(streamed.model))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "blip2_t5", "mllama", "clip"])
def test_what_a_forward_and_squares_and_whole_blocks_and_groups_tell_is_the_same_too(tmp_path: Path, name: str) -> None:
    whole, streamed = pair(tmp_path, name)
    batches = [whole.inputs(2), whole.inputs(2)]
    for statistics in OTHERS:
        assert_same(calibrate(whole, batches, *statistics), calibrate(streamed, batches, *statistics))


@pytest.mark.parametrize("statistics", [("second", "angles"), ("input-norms",)])
def test_batches_and_samples_that_do_not_count_do_not(tmp_path: Path, statistics: Sequence[str]) -> None:
    left, right = (calibrate(one, ragged(one), *statistics) for one in pair(tmp_path, "llava"))
    assert_same(left, right)
    assert right.samples == 5 and right.skipped == 3


def test_the_tokens_that_blocks_turn_most_are_chosen_in_a_reading_of_their_own(tmp_path: Path) -> None:
    options = {"tokens": token_rule("atv")}
    left, right = (calibrate(one, ragged(one), "input-norms", **options) for one in pair(tmp_path, "llava"))
    assert_same(left, right)
    assert right.passes == 2


def test_a_bound_on_the_sums_is_one_for_every_block_by_itself(tmp_path: Path) -> None:
    whole, streamed = pair(tmp_path, "llava")
    left, right = (calibrate(one, [whole.inputs(2)], "first", grad_memory_bytes=20_000) for one in (whole, streamed))
    assert_same(left, right)
    assert 1 < right.passes < left.passes


def test_losses_with_changed_weights_are_refused(tmp_path: Path) -> None:
    _, streamed = pair(tmp_path, "llava")
    with pytest.raises(UnsuitableOptionError, match="whole model at once"):
        calibrate(streamed, [streamed.inputs(2)], "zeroth-order")


def test_a_gradient_that_is_not_finite_is_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    _, tiny = pair(tmp_path, "llava")
    batches = [tiny.inputs(2), tiny.inputs(2)]
    batches[1]["pixel_values"][0] = torch.nan
    before = {name: module.__dict__.get("forward") for name, module in tiny.model.named_modules()}
    with pytest.raises(CalibrationError, match="batch 2 of 2"):
        calibrate(tiny, batches, "gate")
    assert before == {name: module.__dict__.get("forward") for name, module in tiny.model.named_modules()}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny.model.parameters())
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())


def test_what_forwards_hold_goes_into_files_beyond_a_bound_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, streamed = pair(tmp_path, "blip2_t5")
    written: list[int] = []

    def count(*_: object) -> None:
        written.append(sum(path.stat().st_size for path in tmp_path.glob("slimvlm-*/*")))

    keep(monkeypatch, 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    batches = [whole.inputs(2), whole.inputs(2)]
    given = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    found = calibrate(streamed, batches, "gate", progress=count)
    assert_same(calibrate(whole, batches, "gate"), found)
    model: Any = streamed.model
    foreseen = 2 * waiting_bytes(model, find_family(model.config), batches[0], learning=True, itemsize=4)
    assert foreseen / 2 < max(written) < 2 * foreseen
    assert not [*tmp_path.glob("slimvlm-*/*")]
    assert all(
        torch.equal(value, one[name])
        for batch, one in zip(batches, given, strict=True)
        for name, value in batch.items()
    )


@pytest.mark.parametrize("statistic", ["gate", "moments"])
def test_memory_does_not_grow_with_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistic: str) -> None:
    _, tiny = pair(tmp_path, "mllama")

    def held(samples: int) -> int:
        """Most bytes of tensors that are there when all samples are through a block."""
        gc.collect()
        before, most = memories(), [0]

        def weigh(_stage: str, done: int, *_: object) -> None:
            if done % (2 * samples) == 0:  # all are through a block
                gc.collect()
                most.append(sum(size for memory, size in memories().items() if memory not in before))

        calibrate(tiny, [lambda: tiny.inputs(1)] * samples, statistic, progress=weigh)
        return max(most)

    assert held(12) > 1.5 * held(6)  # which are fewer than fill the memory
    keep(monkeypatch, 30_000)
    assert held(12) < 1.05 * held(6)


def memories() -> dict[int, int]:
    """Bytes of all tensors that are there; views share them."""
    things = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    memories = (one.untyped_storage() for one in things if not isinstance(one, Lazy) and not one.is_meta)
    return {memory._cdata: memory.nbytes() for memory in memories}


def test_no_more_than_two_blocks_are_in_memory_at_once(tmp_path: Path) -> None:
    _, streamed = pair(tmp_path, "llava")
    model: Any = streamed.model
    ours = {id(parameter) for parameter in model.parameters()}
    blocks = [sum(one.nbytes for one in model.get_submodule(path).parameters()) for path in blocks_of_model(model)]
    held: list[int] = []

    def weigh(*_: object) -> None:
        alive = (one for one in gc.get_objects() if type(one) is nn.Parameter and not one.is_meta)
        held.append(sum(one.nbytes for one in alive if id(one) not in ours and not isinstance(one, Lazy)))

    family = find_family(model.config)
    gc.collect()
    weigh()  # those of other tests
    others = held.pop()
    options = CalibrationOptions(("gate", "input-norms"))
    collect(model, family, find_units(model, family, "width"), [streamed.inputs(2)] * 3, options, weigh)
    assert max(blocks) < max(held) - others <= 2 * max(blocks) < sum(blocks)
