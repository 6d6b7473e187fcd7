"""Streamed models: what is read when it is needed is what was there, whatever is done to it before."""

from __future__ import annotations

import os

import pytest
import torch
from plans import keep_blocks, random_plan, uniform_plan
from tiny_models import EVERY, tiny_model
from transformers import LlavaForConditionalGeneration
from weighing import Weighed

from slimvlm.compress.errors import CheckpointError, OutputError, UnsuitableOptionError
from slimvlm.compress.evaluation.equality import TOLERANCE
from slimvlm.compress.models.checkpoint import load_model, stream_model
from slimvlm.compress.models.computing import as_stored, cast
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.models.streaming.lazy import Lazy, read
from slimvlm.compress.models.streaming.weights import Holding, streamed
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.stages.slice import masked_difference

SHARD = "60KB"  # several shards per tiny model


def check_same(found, expected):
    """Parameters, buffers and configs of a model streamed and a whole one."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert list(ours) == list(theirs)
        for (name, one), value in zip(ours.items(), read(list(ours.values())), strict=True):
            assert (one.shape, one.dtype) == (value.shape, value.dtype) == (theirs[name].shape, theirs[name].dtype)
            assert torch.equal(value, theirs[name]), name
    assert type(found) is type(expected)
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.can_generate() == expected.can_generate()
    if found.can_generate():
        assert found.generation_config.to_dict() == expected.generation_config.to_dict()


def check_same_files(found, expected):
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == names
    assert [name for name in names if (found / name).read_bytes() != (expected / name).read_bytes()] == []


def cut_both_ways(folder, name, plan_of, layout="per-layer"):
    """A bf16 model streamed, which is looked at, cut as the slice stage does, in fp32, and written in shards: the files
    are those of the model cut whole. Gives the family and the streamed model that was cut.
    """
    tiny = tiny_model(name, "sdpa")
    plan, batch = plan_of(tiny.model), tiny.inputs(2)
    save_checkpoint(folder / "dense", tiny.model.bfloat16(), None, None)
    whole, loaded = load_model(folder / "dense"), stream_model(folder / "dense")
    assert loaded.digest == whole.digest
    check_same(loaded.model, whole.model)
    check_lazy(loaded)
    model = cast(loaded.model, torch.float32)
    assert masked_difference(model, plan, batch) < TOLERANCE[torch.float32]
    for made, where in ((apply_plan(whole.model, plan), "whole"), (as_stored(model), "streamed")):
        save_checkpoint(folder / where, made, None, plan, layout, max_shard_size=SHARD)
    check_same_files(folder / "streamed", folder / "whole")
    return model


def check_lazy(loaded):
    """What is inside of blocks is not in memory, and all else is."""
    blocks = tuple(f"{tower.blocks}." for tower in loaded.family.towers)
    named = dict(loaded.model.named_parameters())
    lazy = {name for name, parameter in named.items() if isinstance(parameter, Lazy)}
    assert lazy == {name for name in named if name.startswith(blocks)} != set()
    assert streamed(loaded.model)


@pytest.mark.parametrize("name", EVERY)
def test_a_streamed_model_is_read_cut_checked_and_written_as_a_whole_one(tmp_path, name):
    model = cut_both_ways(tmp_path, name, lambda model: random_plan(model, seed=1))
    cut, written = dict(model.named_parameters()), dict(stream_model(tmp_path / "streamed").model.named_parameters())
    assert list(cut) == list(written)
    for name, one, other in zip(cut, read(list(cut.values())), read(list(written.values())), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("name", ["blip2_t5", "qwen3_vl"])
def test_a_streamed_model_loses_blocks_as_a_whole_one(tmp_path, name):
    cut_both_ways(tmp_path, name, lambda model: keep_blocks(model, lambda group: [0] if group.num_units > 1 else []))


@pytest.mark.parametrize("name", ["blip2_opt", "qwen2_vl"])
def test_a_streamed_model_is_written_in_the_stock_layout_as_a_whole_one(tmp_path, name):
    cut_both_ways(tmp_path, name, lambda model: uniform_plan(model, "query-slot"), "stock")


def test_a_shard_and_what_becomes_of_one_tensor_are_in_memory_while_a_model_is_cut_and_written(tmp_path):
    config = tiny_model("llava").model.config
    wide = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 10}
    for name, value in wide.items():
        setattr(config.text_config, name, value)
    whole = LlavaForConditionalGeneration(config)
    sizes = [weight.nbytes for weight in whole.parameters()]
    shard = 3 * max(sizes)
    save_checkpoint(tmp_path / "dense", whole, None, None)
    plan = random_plan(whole, seed=1)
    del whole
    for part in ("first", "second"):  # what is imported on the way is there the second time
        model = stream_model(tmp_path / "dense").model
        with Weighed([*model.parameters(), *model.buffers()]) as weighed:
            save_checkpoint(tmp_path / part, apply_plan(model, plan), None, plan, max_shard_size=f"{shard // 1000}KB")
    assert shard < weighed.most < shard + 4 * max(sizes) < sum(sizes) / 2


def test_weights_are_read_in_the_dtype_that_is_asked_for(tmp_path):
    save_checkpoint(tmp_path / "half", tiny_model("llava").model.to(torch.bfloat16), None, None)
    whole, part = (load(tmp_path / "half", dtype=torch.float32).model for load in (load_model, stream_model))
    check_same(part, whole)
    assert not any(value.is_meta for value in read(list(part.parameters())))


def test_a_shard_that_changes_is_refused_where_it_is_read(tmp_path):
    save_checkpoint(tmp_path / "dense", tiny_model("llava").model, None, None)
    model = stream_model(tmp_path / "dense").model
    lazy = next(parameter for parameter in model.parameters() if isinstance(parameter, Lazy))
    os.utime(tmp_path / "dense" / "model.safetensors", (1, 1))
    for looked_at in (lambda: read([lazy]), streamed(model).check_unchanged):
        with pytest.raises(CheckpointError, match="was changed or replaced while it was read") as caught:
            looked_at()
        assert "\n" not in str(caught.value)


def test_a_value_that_is_no_number_is_refused_where_it_is_read(tmp_path):
    model = tiny_model("llava").model
    name = next(name for name, _ in model.named_parameters() if "language_model.layers.1" in name)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("nan")
    save_checkpoint(tmp_path / "dense", model, None, None)
    with pytest.raises(CheckpointError, match="not finite"):
        read([stream_model(tmp_path / "dense").model.get_parameter(name)])


def test_memory_below_two_blocks_is_refused_in_a_sentence(tmp_path):
    save_checkpoint(tmp_path / "dense", tiny_model("llava").model, None, None)
    with pytest.raises(UnsuitableOptionError, match=r"two blocks of .* do not fit into 1e-05 GB") as caught:
        stream_model(tmp_path / "dense", holding=Holding(bound=10_000))
    assert "\n" not in str(caught.value)


def test_weights_in_the_place_of_others_are_written_away_beyond_a_bound(tmp_path):
    save_checkpoint(tmp_path / "dense", tiny_model("llava").model, None, None)
    model = stream_model(tmp_path / "dense").model
    weights, lazies = streamed(model), [parameter for parameter in model.parameters() if isinstance(parameter, Lazy)]
    weights.scratch.bound = sum(lazy.nbytes for lazy in lazies) // 2
    values = [torch.randn(lazy.shape) for lazy in lazies]
    weights.require_room(lazies)
    with torch.no_grad():
        for lazy, value in zip(lazies, values, strict=True):
            lazy.copy_(weights.scratch.keep(value))
    assert 0 < weights.scratch.held <= weights.scratch.bound
    weights.scratch.bound -= 2**60
    with pytest.raises(OutputError, match="of space are free there"):
        weights.require_room(lazies)
    assert all(torch.equal(one, value) for one, value in zip(read(lazies), values, strict=True))
