"""Projections that share a linear are cut as if each had one of its own."""

from __future__ import annotations

import copy
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import Group, find_groups
from slimvlm.compress.slicing.cuts import find_cuts

PHI3 = "llava (clip, phi3)"


@cache
def fused() -> dict[str, tuple[Group, torch.nn.Module]]:
    """The groups of a block with a fused qkv of grouped queries, and a fused gate and up, with the module of each."""
    model = tiny_model(PHI3).model
    groups = [group for group in find_groups(model, find_family(model.config)) if group.tower == "language"]
    block = model.get_submodule("model.language_model.layers.0")
    return {"attention": (groups[0], block.self_attn), "mlp": (groups[1], block.mlp)}


def cut_rows(group, path, kept):
    (rows,) = (cut.rows for cut in find_cuts(group, torch.tensor(kept)) if cut.path.endswith(path))
    return rows


@settings(max_examples=25)
@given(st.sets(st.integers(0, 39), min_size=1, max_size=39))
def test_the_cut_of_a_fused_gate_and_up_is_the_two_cut_and_fused(kept):
    group, mlp = fused()["mlp"]
    kept = sorted(kept)
    gate, up = mlp.gate_up_proj.weight.chunk(2)
    expected = torch.cat([gate[kept], up[kept]])
    assert torch.equal(mlp.gate_up_proj.weight[cut_rows(group, "gate_up_proj", kept)], expected)


@settings(max_examples=25)
@given(st.data())
def test_the_cut_of_a_fused_qkv_is_the_three_cut_and_fused(data):
    group, attention = fused()["attention"]
    assert (group.size, group.kv_heads, group.head_dim) == (4, 2, 8)
    heads = st.sets(st.integers(0, group.kv_heads - 1), min_size=1)
    count = data.draw(st.integers(1, group.heads_per_kv))
    slots = st.permutations(range(group.heads_per_kv))
    kv = sorted(data.draw(heads))
    kept = sorted(head * group.heads_per_kv + slot for head in kv for slot in data.draw(slots)[:count])
    if len(kept) == group.size:
        return
    query, key, value = attention.qkv_proj.weight.split([32, 16, 16])
    own = [query.view(4, 8, -1)[kept], key.view(2, 8, -1)[kv], value.view(2, 8, -1)[kv]]
    expected = torch.cat([part.flatten(0, 1) for part in own])
    assert torch.equal(attention.qkv_proj.weight[cut_rows(group, "qkv_proj", kept)], expected)


def test_the_units_of_fused_projections_own_what_separate_ones_would():
    attention, mlp = (fused()[kind][0] for kind in ("attention", "mlp"))
    assert mlp.weights_per_unit == 3 * 32
    assert attention.unit == "query-slot" and attention.weights_per_unit == 2 * 2 * 8 * 32  # q and o of two heads


def test_an_attention_that_asks_the_config_for_its_heads_gets_a_config_of_its_own():
    from slimvlm.compress.models.modeling_slim import set_attribute

    _, attention = fused()["attention"]
    changed, config = copy.deepcopy(attention), attention.config
    set_attribute(changed, "config.num_attention_heads", 2)
    assert changed.config.num_attention_heads == 2 and config.num_attention_heads == 4
    assert changed.config.hidden_size == config.hidden_size
    assert copy.deepcopy(changed).config.num_attention_heads == 2
