"""Inputs are exactly as large as was asked, of real tokens, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from exports import cut_model
from tiny_models import FACTORIES, IMAGE_TOKEN

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.demo import SAMPLES
from slimvlm.serve.backends.backend import HostClock, time_generation
from slimvlm.serve.backends.torch_backend import TorchBackend
from slimvlm.serve.measuring.workload import InputMaker, Workload, grid
from slimvlm.serve.options import ProfileOptions

DUAL = ("clip", "siglip")
SMALL = {"qwen2_vl": (32, 32), "qwen2_5_vl": (32, 32), "qwen3_vl": (32, 32), "smolvlm": (16, 16), "idefics3": (16, 16)}


def maker_of(name, **options):
    model, collator = cut_model(name)
    return model, InputMaker(collator, ProfileOptions(slim="", **options), SMALL.get(name))


@pytest.mark.parametrize("name", FACTORIES)
def test_every_family_gets_prompts_of_the_asked_length_without_padding(name):
    model, maker = maker_of(name)
    natural = maker.make(Workload(2, None, None, 4))
    assert natural.rows == 2
    if name in DUAL:
        return
    wanted = natural.prompt_tokens + 13
    inputs = maker.make(Workload(2, None, wanted, 4))
    assert inputs.arrays["input_ids"].shape == (2, wanted) == (2, inputs.prompt_tokens)
    assert inputs.arrays["attention_mask"].all()
    before, after = (one.arrays["input_ids"] == IMAGE_TOKEN for one in (natural, inputs))
    assert before.sum() == after.sum() > 0
    backend = TorchBackend(model, maker.collator.family)
    backend.place(inputs.arrays)
    assert time_generation(backend, HostClock(), 3).tokens.shape == (2, 3)


def test_added_tokens_are_plain_ones_of_the_vocabulary():
    _, maker = maker_of("llava")
    ids = maker.read_test().arrays["input_ids"]
    tokenizer = maker.collator.tokenizer
    assert ids.shape == (1, 256)  # as many as the model takes
    assert not set(ids.ravel().tolist()) & {*tokenizer.all_special_ids, IMAGE_TOKEN}
    assert len(np.unique(ids)) > 20


def test_the_same_seed_gives_the_same_inputs():
    first, second = (maker_of("llava")[1].make(Workload(2, None, 40, 4)).arrays for _ in range(2))
    other = maker_of("llava", seed=1)[1].make(Workload(2, None, 40, 4)).arrays
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["pixel_values"], other["pixel_values"])
    assert not np.array_equal(first["pixel_values"][0], first["pixel_values"][1])


def test_an_image_size_is_a_workload_where_the_model_sees_it():
    _, maker = maker_of("qwen2_vl")
    sizes = [maker.make(Workload(1, (side, side), None, 2)) for side in (16, 32)]
    assert sizes[0].pixels[0] < sizes[1].pixels[0]
    assert [one.image_size for one in sizes] == [(16, 16), (32, 32)]
    _, fixed = maker_of("llava")
    assert fixed.make(Workload(1, (16, 16), None, 2)).image_size == (16, 16)
    with pytest.raises(UnsuitableOptionError, match="brings every image to 16x16"):
        fixed.make(Workload(1, (64, 64), None, 2))


def test_real_samples_are_used_where_they_are_given():
    _, maker = maker_of("llava", data=SAMPLES / "test.jsonl", batch_sizes=(3,))
    inputs = maker.make(Workload(3, None, None, 2))
    assert inputs.rows == 3
    assert inputs.arrays["attention_mask"].all()
    noise = maker_of("llava")[1].make(Workload(3, None, None, 2))
    assert not np.array_equal(inputs.arrays["pixel_values"], noise.arrays["pixel_values"])


def test_the_grid_is_every_combination():
    options = ProfileOptions(slim="", batch_sizes=(1, 2), image_sizes=((8, 8), (9, 9)), new_tokens=(3, 4))
    assert len(grid(options)) == 8
    assert grid(options)[0] == Workload(1, (8, 8), None, 3)
