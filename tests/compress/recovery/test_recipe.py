"""Recipes and stages: the paper's schedule for the paper's model, and what holds for any depths."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import FAMILIES
from slimvlm.compress.options import RecoverOptions
from slimvlm.compress.recovery.checks import recipe_of
from slimvlm.compress.recovery.distillation.recipe import (
    LOSSES,
    PROGRESSIONS,
    BlockTarget,
    Recipe,
    Stage,
    make_stages,
    match_blocks,
    parse_recipe,
    stage_bounds,
    supervised_layers,
)

ROWS = {family.name: family for family in FAMILIES}
FLAN_T5_XL = {"vision": 39, "encoder": 24, "decoder": 24}
VE, VE_SHALLOW = list(range(0, 39, 2)), list(range(0, 23, 2))
T5, T5_SHALLOW = list(range(1, 24, 2)), list(range(1, 12, 2))
families = st.sampled_from(FAMILIES)
recipes = st.builds(replace, st.sampled_from(list(PROGRESSIONS.values())), staged=st.booleans())
PAPERS_SHARES = replace(parse_recipe("lpd"), feature_share=None)


def layers(stage: Stage, tower: str) -> list[int]:
    return [block.layer for block in stage.blocks if block.tower == tower]


@st.composite
def depths(draw, family):
    return {tower.name: draw(st.integers(1, 90)) for tower in family.towers}


def test_the_stages_of_blip2_flan_t5_xl_are_those_of_the_paper():
    stages = make_stages(ROWS["blip2_t5"], FLAN_T5_XL, parse_recipe("lpd-paper"))
    expected = [
        ("vision shallow", VE_SHALLOW, [], [], {}, 20),
        ("vision", VE, [], [], {}, 20),
        ("encoder shallow", VE, T5_SHALLOW, [], {}, 80),
        ("encoder", VE, T5, [], {}, 40),
        ("decoder shallow", VE, T5, T5_SHALLOW, {}, 80),
        ("decoder", VE, T5, T5, {}, 80),
        ("task", [], [], [], {"sft": 1.0, "kl": 1.0}, 275),
    ]
    found = [
        (stage.name, layers(stage, "vision"), layers(stage, "encoder"), layers(stage, "decoder"), dict(stage.losses))
        for stage in stages
    ]
    assert found == [row[:5] for row in expected]
    assert [stage.share for stage in stages] == [row[5] / 595 for row in expected]
    betas = {"vision": 1e6, "encoder": 1e9, "decoder": 1e8}
    assert all(block.weight == betas[block.tower] for stage in stages for block in stage.blocks)


def test_the_paper_s_run_of_595_thousand_samples_changes_stage_where_the_paper_does():
    stages = make_stages(ROWS["blip2_t5"], FLAN_T5_XL, PAPERS_SHARES)
    assert stage_bounds(stages, 29_750) == (1000, 2000, 6000, 8000, 12_000, 16_000, 29_750)  # batches of 20


def test_a_decoder_only_model_has_the_decoder_s_samples_and_a_dual_encoder_the_encoder_s():
    for name, shares in (("llava", [20, 20, 80, 80, 275]), ("clip", [20, 20, 80, 40, 275])):
        stages = make_stages(ROWS[name], {"vision": 24, "language": 32}, PAPERS_SHARES)
        assert [stage.share for stage in stages] == [share / sum(shares) for share in shares]
        assert layers(stages[-2], "language") == list(range(1, 32, 2))


@given(st.data(), families, st.floats(0.01, 0.99))
def test_the_feature_stages_get_the_asked_share_in_the_paper_s_proportions(data, family, share):
    depth = data.draw(depths(family))
    *asked, task = make_stages(family, depth, replace(parse_recipe("lpd"), feature_share=share))
    *paper, _ = make_stages(family, depth, PAPERS_SHARES)
    assert 1 - task.share == pytest.approx(share)
    ratios = [one.share / other.share for one, other in zip(asked, paper, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_blockwise_begins_any_recipe_and_has_its_share_of_the_steps():
    alone, before = parse_recipe("blockwise"), parse_recipe("blockwise + lpd+rkl")
    assert (alone.whole, alone.needs_teacher, alone.block_steps(100)) == (False, True, 100)
    assert replace(before, block_share=0) == parse_recipe("lpd+rkl")
    assert before.block_steps(100) == 30
    assert recipe_of(RecoverOptions(recover="blockwise+sft", block_share=0.5)).block_steps(100) == 50
    assert parse_recipe("sft").block_steps(100) == 0
    assert [parse_recipe("lpd+blockwise").block_steps(steps) for steps in (1, 2, 3)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recover": "blockwise+blockwise"}, "'blockwise' comes twice"),
        ({"recover": "0.5*blockwise"}, "'blockwise' is no loss"),
        ({"recover": "blockwise", "block_share": 0.5}, "--block-share is for blockwise before another recipe"),
        ({"recover": "lpd", "block_share": 0.5}, "--block-share is for blockwise before another recipe"),
        ({"recover": "blockwise+lpd", "block_share": 1.0}, "choose one between 0 and 1"),
        ({"recover": "blockwise", "train": "projector"}, "no block holds the projector"),
        ({"recover": "blockwise+sft", "train": "projector"}, "no block holds the projector"),
        ({"recover": "blockwise", "train": "lora+projector"}, "no block holds the projector"),
        ({"recover": "blockwise", "accumulate": 2}, "--accumulate is for the training of the model as a whole"),
        ({"recover": "blockwise", "temperature": 2.0}, "--temperature is for the losses kl and rkl"),
    ],
)
def test_what_a_block_wise_recovery_would_not_use_is_refused(options, message):
    with pytest.raises(UnsuitableOptionError, match=re.escape(message)):
        recipe_of(RecoverOptions(**options))


def test_the_share_is_a_fifth_unless_asked_or_the_paper_s():
    assert parse_recipe("lpd").feature_share == 0.2
    assert parse_recipe("lpd-paper").feature_share is None
    assert recipe_of(RecoverOptions(recover="lpd-paper", feature_share=0.3)).feature_share == 0.3


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, math.nan])
def test_a_share_that_leaves_no_step_to_one_of_both_is_refused(share):
    with pytest.raises(UnsuitableOptionError, match="between 0 and 1"):
        replace(parse_recipe("lpd"), feature_share=share)


def test_without_stages_everything_is_supervised_all_the_time():
    (stage,) = make_stages(ROWS["llava"], {"vision": 4, "language": 3}, replace(parse_recipe("lpd"), staged=False))
    assert (stage.share, stage.losses) == (1.0, {"sft": 1.0, "kl": 1.0, "hidden": 1.0})
    blocks = (("vision", 1), ("vision", 3), ("language", 0), ("language", 2))
    assert stage.blocks == tuple(BlockTarget(tower, layer, 0.5) for tower, layer in blocks)


@given(st.data(), families, recipes)
def test_shares_sum_to_one_and_every_tower_weighs_one(data, family, recipe):
    for stage in make_stages(family, data.draw(depths(family)), recipe):
        if not recipe.literal:
            sums = {tower: 0.0 for tower in {block.tower for block in stage.blocks}}
            for block in stage.blocks:
                sums[block.tower] += block.weight
            assert all(total == pytest.approx(1) for total in sums.values())
    assert sum(stage.share for stage in make_stages(family, data.draw(depths(family)), recipe)) == pytest.approx(1)


@given(st.data(), families)
def test_the_supervised_blocks_grow_to_the_last_of_every_tower_and_only_then_comes_the_task(data, family):
    depth = data.draw(depths(family))
    *features, task = make_stages(family, depth, parse_recipe("lpd"))
    assert len(features) == 2 * len(family.towers)
    reached: set[tuple[str, int]] = set()
    for stage in features:
        blocks = {(block.tower, block.layer) for block in stage.blocks}
        assert reached <= blocks
        assert not stage.losses
        assert all(0 <= layer < depth[tower] for tower, layer in blocks)
        reached = blocks
    assert {(tower, count - 1) for tower, count in depth.items()} <= reached
    assert not task.blocks
    assert task.losses


@given(st.integers(1, 200))
def test_every_second_block_counted_back_from_the_last_is_supervised(depth):
    chosen = supervised_layers(depth)
    assert chosen[-1] == depth - 1
    assert chosen[0] in (0, 1)
    assert all(right - left == 2 for left, right in pairwise(chosen))


@given(st.data(), families, recipes, st.integers(0, 5000))
def test_bounds_of_stages_never_fall_end_at_the_last_step_and_leave_no_stage_without_one(data, family, recipe, steps):
    stages = make_stages(family, data.draw(depths(family)), recipe)
    bounds = (0, *stage_bounds(stages, steps))
    assert bounds[-1] == steps
    lengths = [after - before for before, after in pairwise(bounds)]
    assert min(lengths) >= (1 if steps >= len(stages) else 0)
    if steps > 1000:
        assert all(abs(n - stage.share * steps) <= 2 for n, stage in zip(lengths, stages, strict=True))


def test_no_stage_and_less_than_no_step_are_refused():
    with pytest.raises(ValueError, match="0 stages and 5 steps"):
        stage_bounds((), 5)
    with pytest.raises(ValueError, match="-1 steps"):
        stage_bounds((Stage("task", (), {"sft": 1.0}, 1.0),), -1)


def test_a_tower_without_blocks_is_refused():
    with pytest.raises(ValueError, match="tower 'language' of 'llava' has no block"):
        make_stages(ROWS["llava"], {"vision": 3}, parse_recipe("lpd"))


@given(st.dictionaries(st.sampled_from(LOSSES), st.floats(1e-3, 1e3), min_size=1))
def test_a_sum_of_losses_is_read_back_as_written(losses):
    recipe = parse_recipe(" + ".join(f"{weight!r}*{name}" for name, weight in losses.items()))
    assert (recipe.losses, recipe.features) == (losses, False)
    assert [stage.losses for stage in make_stages(ROWS["clip"], {"vision": 1, "language": 1}, recipe)] == [losses]


def test_a_loss_without_a_weight_weighs_one_and_only_sft_needs_no_teacher():
    assert parse_recipe("sft+0.5*kl").losses == {"sft": 1.0, "kl": 0.5}
    assert not parse_recipe("2*sft").needs_teacher
    assert all(parse_recipe(text).needs_teacher for text in ("lpd", "kl", "rkl", "hidden+sft"))


def test_losses_added_to_lpd_join_those_of_its_last_stage_or_weigh_them_anew():
    assert parse_recipe("lpd").losses == {"sft": 1.0, "kl": 1.0, "hidden": 1.0}
    assert parse_recipe("lpd-paper").losses == {"sft": 1.0, "kl": 1.0}
    assert parse_recipe("lpd-paper+rkl").losses == {"sft": 1.0, "kl": 1.0, "rkl": 1.0}
    assert parse_recipe("lpd+0.5*kl").losses == {"sft": 1.0, "kl": 0.5, "hidden": 1.0}
    assert parse_recipe("lpd+0*hidden").losses == {"sft": 1.0, "kl": 1.0}
    assert parse_recipe("hidden+lpd").features
    assert parse_recipe("hidden+lpd").staged


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"'' is no loss; accepted are {', '.join(PROGRESSIONS)} and sums of {', '.join(LOSSES)}"),
        ("sft+ce", "recipe 'sft[+]ce': 'ce' is no loss; accepted are lpd"),
        ("2*lpd", "'lpd' is no loss"),
        ("lpd+lpd", "'lpd' comes twice"),
        ("lpd+lpd-paper", "excludes the others"),
        ("sft+sft", "'sft' comes twice; give its weight once"),
        ("x*sft", "'x' is no number"),
        ("*sft", "'' is no number"),
        ("0*sft", "nothing to learn from"),
        ("sft+0*kl", "the weight 0.0 of 'kl' is not a positive number"),
        ("-1*kl", "the weight -1.0 of 'kl' is not a positive number"),
        ("nan*kl", "the weight nan of 'kl' is not a positive number"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_with_what_is_accepted(text, message):
    with pytest.raises(UnsuitableOptionError, match=message):
        parse_recipe(text)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(UnsuitableOptionError, match="is not positive"):
        replace(parse_recipe("kl"), temperature=temperature)


def test_a_recipe_with_an_unknown_loss_or_without_hidden_state_is_refused():
    with pytest.raises(UnsuitableOptionError, match="the loss 'l2' is unknown"):
        Recipe({"l2": 1.0})
    with pytest.raises(UnsuitableOptionError, match="needs a hidden state"):
        Recipe({"hidden": 1.0}, hidden_states=())


@given(st.data())
def test_a_layer_follows_the_output_that_the_next_kept_layer_read(data):
    depth = data.draw(st.integers(1, 40))
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1))))
    targets = match_blocks(kept, depth)
    assert len(targets) == len(kept)
    assert targets[-1] == depth - 1
    assert all(after == before + 1 for before, after in zip(targets, kept[1:], strict=False))
    assert all(target >= own for target, own in zip(targets, kept, strict=True))


def test_when_no_layer_was_removed_each_follows_itself():
    assert match_blocks(tuple(range(7)), 7) == tuple(range(7))
    assert match_blocks((0, 1, 4, 5), 8) == (0, 3, 4, 7)


@pytest.mark.parametrize("kept", [(), (1, 1), (2, 1), (-1, 0), (0, 8)])
def test_kept_layers_that_cannot_be_are_refused(kept):
    with pytest.raises(ValueError, match="sorted, unique and below 8"):
        match_blocks(kept, 8)
