"""Every row of the family table against a model that transformers builds from a real config."""

from __future__ import annotations

import operator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import transformers as tf
from plans import random_plan
from tiny.texts import TEXTS as tiny_texts
from tiny.towers import TOWERS as tiny_towers
from tiny_models import COVERING, EVERY, tiny_model

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.families import FAMILIES, TEXTS, TOWERS, Attention, Mixer, find_family
from slimvlm.compress.models.groups import count_parameters, find_groups
from slimvlm.compress.models.saving import stock_values
from slimvlm.compress.slicing.apply import apply_plan

NAMES = [*EVERY, *COVERING]


def config_of(model, tower):
    return operator.attrgetter(tower.config)(model.config)


def first_of(config, *names):
    return next(getattr(config, name) for name in names if getattr(config, name, None) is not None)


def test_every_named_family_has_a_tiny_model_and_no_name_comes_twice():
    named = [family.name for family in FAMILIES]
    assert len(set(named)) == len(named)
    assert set(named) <= set(NAMES)
    assert len(set(NAMES)) == len(NAMES)


def test_every_tower_and_text_model_that_goes_into_many_families_is_in_one_of_them():
    configs = [tiny_model(name).model.config for name in NAMES]
    for part, made, table in (("vision_config", tiny_towers, TOWERS), ("text_config", tiny_texts, TEXTS)):
        assert set(made) <= {getattr(config, part).model_type for config in configs}
        assert set(made) <= set(table)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_finds_its_own_row(name):
    assert find_family(tiny_model(name).model.config).name == name


@pytest.mark.parametrize("name", NAMES)
def test_paths_resolve_and_sizes_are_those_of_the_config(name):
    model = tiny_model(name).model
    family = find_family(model.config)
    for tower in family.towers:
        assert len(model.get_submodule(tower.blocks)) == getattr(config_of(model, tower), tower.depth[0])
    found = set()
    for group in find_groups(model, family, dead=True):
        config, part = config_of(model, group.home), group.part
        if isinstance(part, Attention):
            heads = first_of(config, "num_attention_heads", "num_heads")
            assert (group.size, group.kv_heads) == (heads, getattr(config, "num_key_value_heads", None) or heads)
        elif part.stock:
            assert stock_values(group) == {part.stock: getattr(config, part.stock)}
        found.add((group.tower, part.key))
    parts = [(tower.name, part) for tower in family.towers for part in tower.parts]
    assert found == {(tower, part.key) for tower, part in parts if not isinstance(part, Mixer)}


@pytest.mark.parametrize("name", NAMES)
def test_grouped_queries_are_real_where_the_text_config_has_them(name):
    model = tiny_model(name).model
    tower = find_family(model.config).towers[-1]
    config = config_of(model, tower)
    if hasattr(config, "num_key_value_heads"):
        assert config.num_key_value_heads < config.num_attention_heads


@pytest.mark.parametrize("name", NAMES)
def test_the_projector_is_there_has_weights_and_shares_none_with_a_block(name):
    model = tiny_model(name).model
    family = find_family(model.config)
    blocks = {id(p) for tower in family.towers for p in model.get_submodule(tower.blocks).parameters()}
    assert family.projector
    for path in family.projector:
        weights = list(model.get_submodule(path).parameters())
        assert weights
        assert not blocks & {id(parameter) for parameter in weights}


def config_named(model_type, tower=None, text=None):
    parts = {"vision_config": SimpleNamespace(model_type=tower), "text_config": SimpleNamespace(model_type=text)}
    return SimpleNamespace(model_type=model_type, **parts)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (config_named("bert"), "model type 'bert' is not supported; known families: llava, .*siglip"),
        (
            config_named("llava", "swin", "llama"),
            "vision tower 'swin' of a 'llava' model .* known .*: clip_vision_model,",
        ),
        (
            config_named("llava", "dinov2", "mamba"),
            "text model 'mamba' of a 'llava' model .* known text models: llama,",
        ),
        (
            config_named("paligemma", "siglip_vision_model", "qwen2"),
            "text model 'qwen2' of a 'paligemma' model .* known text models: gemma, gemma2, gemma3_text",
        ),
    ],
)
def test_what_has_no_row_is_refused_with_the_known_ones(config, said):
    with pytest.raises(UnsupportedModelError, match=said):
        find_family(config)


def test_a_tower_in_an_old_file_that_bears_the_name_of_its_family_is_found():
    config = tf.Idefics3Config(vision_config={"model_type": "idefics3"})
    assert config.vision_config.model_type == "idefics3"
    assert find_family(config).name == "idefics3"


def test_a_tower_and_a_text_model_that_no_family_names_are_composed():
    config = config_named("llava", "siglip_vision_model", "qwen2")
    family = find_family(config)
    assert (family.name, family.model_type, family.kind) == ("llava (siglip, qwen2)", "llava", "decoder")
    assert [tower.blocks for tower in family.towers] == [
        "model.vision_tower.encoder.layers",
        "model.language_model.layers",
    ]


def test_a_plan_that_was_made_before_families_were_composed_still_fits():
    """It names the family alone, whatever tower and text model it was for."""
    model = tiny_model("llava_dinov2").model
    plan = replace(random_plan(model), family="llava")
    assert count_parameters(apply_plan(model, plan)) == plan.parameters_after


def test_a_tower_whose_pooling_head_shares_the_width_of_its_blocks_has_no_stock_cut():
    config = config_named("llava", "siglip_vision_model", "qwen2")
    for pooled, stock in ((True, None), (False, "intermediate_size")):
        config.vision_config.vision_use_head = pooled
        assert find_family(config).towers[0].parts[1].stock == stock
