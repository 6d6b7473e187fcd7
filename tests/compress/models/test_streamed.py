"""Streamed models: what is read when it is needed is what was there, whatever is done to it before."""

from __future__ import annotations

import os

import pytest
import torch
from plans import random_plan
from tiny_models import COVERING, EVERY, tiny_model

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.checkpoint import load_model, stream_model
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.models.streaming.lazy import Lazy, read
from slimvlm.compress.models.streaming.weights import streamed
from slimvlm.compress.slicing.apply import apply_plan

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


@pytest.mark.parametrize("name", [*EVERY, *COVERING])
def test_every_weight_of_a_dense_checkpoint_is_what_from_pretrained_gives(tmp_path, name):
    save_checkpoint(tmp_path / "dense", tiny_model(name).model, None, None)
    whole, loaded = load_model(tmp_path / "dense"), stream_model(tmp_path / "dense")
    model, blocks = loaded.model, tuple(f"{tower.blocks}." for tower in loaded.family.towers)
    check_same(model, whole.model)
    assert loaded.digest == whole.digest
    assert streamed(model)
    assert not streamed(whole.model)
    lazy = {name for name, parameter in model.named_parameters() if isinstance(parameter, Lazy)}
    assert lazy == {name for name, _ in model.named_parameters() if name.startswith(blocks)}


@pytest.mark.parametrize("name", EVERY)
def test_every_weight_of_a_cut_checkpoint_in_shards_is_what_from_pretrained_gives(tmp_path, name):
    model = tiny_model(name).model
    plan = random_plan(model, seed=1)
    save_checkpoint(tmp_path / "cut", apply_plan(model, plan), None, plan, max_shard_size=SHARD)
    check_same(stream_model(tmp_path / "cut").model, load_model(tmp_path / "cut").model)


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
