"""Every row of the family table against a model that transformers builds from a real config."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import pytest
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.families import FAMILIES, Attention, find_family

NAMES = [family.name for family in FAMILIES]


def config_of(model, tower):
    return operator.attrgetter(tower.config)(model.config)


def first_of(config, *names):
    return next(getattr(config, name) for name in names if getattr(config, name, None) is not None)


def test_every_family_has_a_tiny_model_and_no_name_comes_twice():
    assert sorted(NAMES) == sorted(FACTORIES)
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_finds_its_own_row(name):
    assert find_family(tiny_model(name).model.config).name == name


@pytest.mark.parametrize("name", NAMES)
def test_paths_resolve_and_sizes_are_those_of_the_config(name):
    model = tiny_model(name).model
    for tower in find_family(model.config).towers:
        config = config_of(model, tower)
        blocks = model.get_submodule(tower.blocks)
        layers = "num_decoder_layers" if tower.name == "decoder" else "num_hidden_layers"
        assert len(blocks) == first_of(config, layers, "depth")
        heads = first_of(config, "num_attention_heads", "num_heads")
        for block in blocks:
            for part in tower.parts:
                if isinstance(part, Attention):
                    module = block.get_submodule(part.module)
                    head_dim = getattr(module, part.head_dim)
                    rows = [module.get_submodule(path).weight.shape[0] for path in part.rows]
                    kv_heads = getattr(config, "num_key_value_heads", None) or heads
                    expected = [3 * heads] if len(rows) == 1 else [heads, kv_heads, kv_heads]
                    assert rows == [count * head_dim for count in expected]
                    assert module.get_submodule(part.output).weight.shape[1] == heads * head_dim
                else:
                    width = {block.get_submodule(path).weight.shape[0] for path in part.rows}
                    assert width == {block.get_submodule(part.output).weight.shape[1]}
                    if part.stock:
                        assert width == {getattr(config, part.stock)}


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


def test_an_unknown_model_type_is_refused_with_the_known_ones():
    with pytest.raises(UnsupportedModelError, match="'bert' is not supported; known families: .*llava, .*siglip"):
        find_family(SimpleNamespace(model_type="bert"))


def test_blip2_with_another_language_model_is_refused():
    config = SimpleNamespace(model_type="blip-2", text_config=SimpleNamespace(model_type="llama"))
    with pytest.raises(UnsupportedModelError, match="'blip-2' with text model 'llama'"):
        find_family(config)
