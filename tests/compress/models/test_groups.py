"""Groups: what must be cut together, for every family; units counted by hand; the paper's model without its weights."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from paper_scale import blip2_flan_t5_xl
from plans import random_plan
from tiny_models import EVERY, tiny_model
from torch import nn

from slimvlm.compress.errors import UnsupportedModelError
from slimvlm.compress.models.families import TEXTS, Mixer, find_family
from slimvlm.compress.models.families.parts import GQA
from slimvlm.compress.models.groups import Group, count_parameters, find_groups, live_blocks
from slimvlm.compress.models.projections import Member
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.cuts import kept_kv_heads, member_indices

UNITS = ("auto", "kv-group", "query-slot")


def groups_of(model, attention_unit="auto"):
    return find_groups(model, find_family(model.config), attention_unit)


def uncut_in(tower):
    """Modules of a block that are not cut inside."""
    return tuple(part.exit.rpartition(".")[0] for part in tower.parts if isinstance(part, Mixer))


def attention_group(heads=8, kv_heads=2, head_dim=3):
    members = (Member("q", 0, "query", head_dim), Member("k", 0, "kv", head_dim), Member("o", 1, "query", head_dim))
    sizes = {"size": heads, "kv_heads": kv_heads, "head_dim": head_dim, "members": members}
    return Group(
        TEXTS["llama"].towers[0],
        0,
        GQA,
        "a",
        **sizes,
        unit="head",
        num_units=heads,
        weights_per_unit=1,
        parameters_per_unit=1,
    )


@pytest.mark.parametrize("name", EVERY)
def test_groups_cover_every_linear_of_every_block_exactly_once(name):
    model = tiny_model(name).model
    family = find_family(model.config)
    covered = Counter()
    for group in groups_of(model):
        everything = torch.arange(group.size)
        for path in {member.path for member in group.members}:
            members = [member for member in group.members if member.path == path]
            rows = torch.cat([member_indices(group, member, everything) for member in members]).tolist()
            assert rows == list(range(model.get_submodule(path).weight.shape[members[0].dim]))
            covered[path] += 1
    linears = {
        f"{tower.blocks}.{layer}.{path}"
        for tower in family.towers
        for layer, block in enumerate(model.get_submodule(tower.blocks)[: live_blocks(model, family, tower)])
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(uncut_in(tower))
    }
    assert set(covered) >= linears
    assert set(covered.values()) == {1}
    assert not any(isinstance(model.get_submodule(path), nn.Linear) for path in set(covered) - linears)


@pytest.mark.parametrize("name", EVERY)
def test_the_rows_of_two_sets_of_heads_do_not_overlap(name):
    model = tiny_model(name).model
    for group in groups_of(model):
        per_kv = group.heads_per_kv if group.kind == "attention" else 1
        half = group.size // per_kv // 2 * per_kv
        for member in group.members:
            first = member_indices(group, member, torch.arange(half))
            second = member_indices(group, member, torch.arange(half, group.size))
            whole = member_indices(group, member, torch.arange(group.size))
            assert torch.cat([first, second]).tolist() == whole.tolist()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", EVERY)
def test_the_units_of_a_group_own_what_its_tensors_hold(name, unit):
    model = tiny_model(name).model
    for group in groups_of(model, unit):
        weights = parameters = 0
        for member in group.members:
            if group.unit == "query-slot" and member.heads == "kv":
                continue
            module, lines = model.get_submodule(member.path), len(group.indices_of(member)) * member.width
            own = lines * (1 if member.norm else module.weight.shape[1 - member.dim])
            weights += 0 if member.norm else own
            parameters += own + (lines if member.dim == 0 and getattr(module, "bias", None) is not None else 0)
        assert group.weights_per_unit * group.num_units == weights
        assert group.parameters_per_unit * group.num_units == parameters
        assert set(group.macs) == {group.weights_per_unit * group.share}


def test_auto_takes_query_slots_where_kv_heads_are_few_and_heads_where_they_are_not_shared():
    units = {group.tower: group.unit for group in groups_of(tiny_model("llava").model) if group.kind == "attention"}
    assert units == {"vision": "head", "language": "query-slot"}


@pytest.mark.parametrize("unit", UNITS)
def test_group_keys_are_unique_and_the_same_on_the_meta_device(unit):
    for name in ("llava", "blip2_t5", "internvl"):
        model = tiny_model(name).model
        groups = groups_of(model, unit)
        assert len({group.key for group in groups}) == len(groups)
        assert groups_of(copy.deepcopy(model).to("meta"), unit) == groups


def test_groups_of_a_cut_model_have_the_sizes_of_the_plan():
    model = tiny_model("qwen3_vl").model
    plan = random_plan(model, seed=3)
    kept = {group.key: group.size for group in groups_of(apply_plan(model, plan))}
    assert kept == {key: len(indices) for key, indices in plan.keep.items()}


def test_kept_query_heads_name_their_kv_heads_and_rows():
    group = attention_group(heads=8, kv_heads=2, head_dim=3)  # query heads 0-3 on KV head 0, 4-7 on 1
    kept = torch.tensor([1, 4])
    assert kept_kv_heads(group, kept).tolist() == [0, 1]
    query, kv, output = group.members
    assert member_indices(group, query, kept).tolist() == [3, 4, 5, 12, 13, 14]
    assert member_indices(group, kv, kept).tolist() == [0, 1, 2, 3, 4, 5]
    assert member_indices(group, output, kept).tolist() == [3, 4, 5, 12, 13, 14]
    assert member_indices(group, kv, torch.tensor([4, 7])).tolist() == [3, 4, 5]


def test_rows_of_a_fused_projection_lie_in_their_own_part():
    group = attention_group(heads=4, kv_heads=4, head_dim=2)
    value = Member("qkv", 0, "kv", 2, start=16)
    assert member_indices(group, value, torch.tensor([0, 3])).tolist() == [16, 17, 22, 23]


def test_kv_heads_with_different_numbers_of_query_heads_are_refused():
    with pytest.raises(
        ValueError, match=r"language.0.attn: every kept KV head must keep the same number .* got \[2, 1\]"
    ):
        kept_kv_heads(attention_group(), torch.tensor([0, 1, 5]))


def test_an_unknown_attention_unit_is_refused():
    with pytest.raises(ValueError, match="'neuron' is unknown; choose one of auto, kv-group, query-slot"):
        groups_of(tiny_model("llava").model, "neuron")


def test_a_model_without_the_modules_of_its_row_is_refused_by_path():
    model = tiny_model("llava").model
    del model.model.language_model.layers[1].mlp.up_proj
    with pytest.raises(UnsupportedModelError, match=r"has no module '.*mlp.up_proj', which family 'llava' needs"):
        groups_of(model)


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    assert count_parameters(model) == 30
    model[1].weight = model[0].weight
    assert count_parameters(model) == 15


@pytest.fixture(scope="module")
def flan_t5_xl():
    return blip2_flan_t5_xl()


def test_paper_scale_model_has_the_groups_units_and_parameters_of_the_paper(flan_t5_xl):
    groups = groups_of(flan_t5_xl)
    k_bias = 39 * 1408  # transformers keeps a bias for k in the fused qkv, the paper's model has none
    assert len(groups) == 198
    assert sum(group.num_units for group in groups) == 488_304
    assert count_parameters(flan_t5_xl) == 3_942_391_680 + k_bias
    assert sum(group.num_units * group.parameters_per_unit for group in groups) == 3_702_281_472 + k_bias
    vision = [group for group in groups if group.modality == "vision"]
    assert sum(group.num_units for group in vision) == 240_240
    costs = {(group.tower, group.kind): group.parameters_per_unit for group in groups}
    assert costs == {
        ("vision", "attention"): 495_792 + 88,
        ("vision", "mlp"): 2_817,
        ("encoder", "attention"): 524_288,
        ("encoder", "mlp"): 6_144,
        ("decoder", "attention"): 524_288,
        ("decoder", "mlp"): 6_144,
    }


def test_paper_scale_model_is_cut_without_its_weights(flan_t5_xl):
    model = copy.deepcopy(flan_t5_xl)
    plan = random_plan(model, seed=1)
    apply_plan(model, plan)
    assert count_parameters(model) == plan.parameters_after
    assert all(parameter.is_meta for parameter in model.parameters())
