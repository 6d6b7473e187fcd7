"""Blocks behind the last hidden state that is read: they leave whole, for free, and nothing else changes."""

import pytest
import torch
import transformers
from outputs import logits
from plans import make_plan as uniform
from plans import random_plan
from tiny_models import FACTORIES, Tiny, reading, tiny_model

from slimvlm.compress.allocate.budget import Budget, plan_units
from slimvlm.compress.allocate.facts import facts_of
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.models.families import FAMILIES, find_family
from slimvlm.compress.models.groups import count_parameters, dead_blocks, depths_of, find_groups
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.plan import Plan
from slimvlm.compress.recovery.distillation.teacher_checks import check_teacher
from slimvlm.compress.rounds import Planning, plan_in_rounds
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.mask import mask_plan

SELECTING = [family.name for family in FAMILIES if any(tower.states for tower in family.towers)]
LIVE = {-1: 3, -2: 2, -3: 1, 3: 3, 2: 2, (-2, 1): 2, (0, -3): 1, (-1, -2): 3}  # of three blocks, by what is read
SINGLE = ("internvl", "aya_vision", "mistral3")  # their projectors take the states of one block
CASES = [(name, read) for name in SELECTING for read in LIVE if name not in SINGLE or isinstance(read, int)]


def features(tiny: Tiny) -> torch.Tensor:
    given = tiny.inputs(2)
    names = ("pixel_values", "image_sizes")
    with torch.no_grad():
        found = tiny.model.get_image_features(**{name: given[name] for name in names if name in given}).pooler_output
    return torch.cat(list(found)) if isinstance(found, tuple | list) else found


@pytest.mark.parametrize(("name", "states"), CASES)
def test_dead_blocks_leave_and_the_features_stay_the_same_bits(name, states):
    tiny = reading(name, states)
    model, family = tiny.model, find_family(tiny.model.config)
    blocks = model.get_submodule(family.towers[0].blocks)
    lost = count_parameters(blocks[LIVE[states] :])
    seen, answers = features(tiny), logits(model, tiny.inputs(2))
    plan = uniform(model, lambda group: range(group.size))
    assert (plan.dropped, plan.dropped_parameters) == ({"vision": 3 - LIVE[states]} if lost else {}, lost)
    assert {group.layer for group in find_groups(model, family) if group.tower == "vision"} == set(range(LIVE[states]))
    before = count_parameters(model)
    apply_plan(model, plan)
    assert count_parameters(model) == before - lost == plan.parameters_after
    assert len(blocks) == LIVE[states] == model.config.vision_config.num_hidden_layers
    assert torch.equal(features(tiny), seen) and torch.equal(logits(model, tiny.inputs(2)), answers)
    assert dead_blocks(model, family) == {}


@pytest.mark.parametrize("layout", ["per-layer", "stock"])
@pytest.mark.parametrize("name", SELECTING)
def test_every_way_of_loading_builds_the_shorter_tower(tmp_path, name, layout):
    tiny = reading(name, -2)
    expected = logits(tiny.model, tiny.inputs(1))
    model = apply_plan(tiny.model, uniform(tiny.model, lambda group: range(group.size), layout=layout))
    save_checkpoint(tmp_path / "slim", model, None, None, layout)
    ways = [load_model(tmp_path / "slim").model]
    if layout == "stock":
        ways.append(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "slim"))
        assert type(ways[-1]) is type(tiny_model(name).model)
    else:
        remote = {"trust_remote_code": True, "code_revision": None}
        ways.append(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "slim", **remote))
    for loaded in ways:
        assert torch.equal(logits(loaded.eval(), tiny.inputs(1)), expected)


def test_families_that_read_the_last_block_have_none():
    for name in FACTORIES:
        model = tiny_model(name).model
        found = dead_blocks(model, find_family(model.config))
        assert ("vision" in found) == (getattr(model.config, "vision_feature_layer", -1) == -2)


def scored(name: str):
    tiny = reading(name, -2)
    groups = find_groups(tiny.model, find_family(tiny.model.config))
    return tiny, groups, score_groups(groups, CRITERIA["random"])


@pytest.mark.parametrize("name", SELECTING)
def test_what_is_free_counts_and_comes_first(name):
    tiny, groups, scores = scored(name)
    facts = facts_of(tiny.model, groups)
    plan = plan_units(groups, scores, Budget(0.25), facts)
    dead = facts.dead["vision"]
    assert plan.removed_fraction == pytest.approx(0.25, abs=0.002)
    assert (plan.dropped, plan.dropped_parameters) == ({"vision": 1}, dead.parameters)
    assert plan.towers["vision"].macs_before == facts.macs["vision"] > 3 * dead.macs - 1
    little = plan_units(groups, scores, Budget(0.01), facts)
    assert all(len(kept) == little.sizes[key] for key, kept in little.keep.items())
    assert little.parameters_before - little.parameters_after == dead.parameters
    tower = plan_units(groups, scores, Budget(0.25, tower_ratio={"vision": 0.5}), facts).towers["vision"]
    assert tower.parameters_after / tower.parameters_before == pytest.approx(0.5, abs=0.005)
    assert Plan.from_json(plan.to_json()) == plan


def test_rounds_drop_them_once():
    tiny, groups, _ = scored("llava")
    dense = facts_of(tiny.model, groups)
    planning = Planning(Budget(0.3), CRITERIA["magnitude"], rounds=3)
    plan = plan_in_rounds(tiny.model, lambda _: [], planning).plan
    assert (plan.dropped, plan.dropped_parameters) == ({"vision": 1}, dense.dead["vision"].parameters)
    assert plan.parameters_before == dense.parameters
    assert plan.removed_fraction == pytest.approx(0.3, abs=0.002)
    fresh = reading("llava", -2).model
    assert count_parameters(apply_plan(fresh, plan)) == plan.parameters_after


@pytest.mark.parametrize("name", SELECTING)
def test_the_cut_model_is_the_masked_dense_one_and_the_dense_one_can_teach_it(name):
    dense, cut = reading(name, -2), reading(name, -2)
    plan, family = random_plan(dense.model), find_family(dense.model.config)
    apply_plan(cut.model, plan)
    assert depths_of(cut.model, family) == depths_of(dense.model, family)
    check_teacher(cut.model, dense.model, family, {})
    masked = logits(mask_plan(dense.model, plan), dense.inputs(1))
    torch.testing.assert_close(logits(cut.model, cut.inputs(1)), masked, rtol=1e-4, atol=1e-5)


def test_a_plan_for_another_choice_of_states_is_refused_before_anything_is_cut():
    plan = random_plan(reading("llava", -2).model)
    other = reading("llava", -1).model
    before = count_parameters(other)
    with pytest.raises(CheckpointError, match=r"drops \{'vision': 1\} blocks that nobody reads, this model has \{\}"):
        apply_plan(other, plan)
    assert count_parameters(other) == before
