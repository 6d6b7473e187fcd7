"""What changes of whole groups do to the loss: golden Z1 of ECoFLaP's specification, gradients, weights given back."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import FACTORIES, Tiny, tiny_model
from torch import nn

from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_blocks, find_groups, find_units
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.collector import Side
from slimvlm.compress.statistics.collectors.sensitivity import directional_slope, root_mean_square
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions

ORDERS = ("first-order", "zeroth-order")


def seen(tiny: Tiny, name: str, batches: list, units: str = "width", seed: int = 0) -> dict[str, float]:
    family = find_family(tiny.model.config)
    groups = find_units(tiny.model, family, units)
    found = collect(tiny.model, family, groups, batches, CalibrationOptions((name,), seed=seed)).seen[name]
    return {key: value.item() for key, value in found.items()}


def test_golden_z1_the_slope_along_a_perturbation_is_exact_where_the_loss_is_quadratic():
    weight, x, y = torch.tensor([[1.0, -2], [0.5, 3]]).double(), torch.tensor([2.0, -1]), torch.tensor([1.0, 0])
    before = weight.clone()
    noises = torch.tensor([[[0.5, -1], [1, 1]], [[-1, 0.5], [1, -2]]]).double()
    slopes = [
        directional_slope([weight], [noise], 1e-3, lambda: 0.5 * (weight @ x.double() - y).square().sum())
        for noise in noises
    ]
    assert slopes == pytest.approx([4.0, -15.5], abs=1e-6)
    assert torch.equal(weight, before)


def test_the_zeroth_order_is_in_proportion_to_the_gradient_norm_within_its_standard_error():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))
    x, y = torch.randn(32, 6), torch.randn(32, 3)
    draws = 64
    for linear in (mlp[0], mlp[2]):
        (gradient,) = torch.autograd.grad((mlp(x) - y).square().mean(), linear.weight)
        rms, generator = root_mean_square(linear.weight.detach()), torch.Generator().manual_seed(1)
        with torch.no_grad():
            slopes = [
                abs(directional_slope([linear.weight], [rms * noise], 1e-3, lambda: (mlp(x) - y).square().mean()))
                for noise in torch.randn(draws, *linear.weight.shape, generator=generator)
            ]
        expected = math.sqrt(2 / math.pi) * float(rms * gradient.norm())
        assert sum(slopes) / draws == pytest.approx(expected, rel=3 * math.sqrt(math.pi / 2 - 1) / math.sqrt(draws))


@pytest.mark.parametrize("name", FACTORIES)
def test_every_group_of_every_family_has_both_and_the_model_is_what_it_was_to_the_bit(name):
    tiny = tiny_model(name)
    batches = [tiny.inputs(2), tiny.inputs(3)]
    tiny.model.train()
    modes = [module.training for module in tiny.model.modules()]
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    keys = [group.key for group in find_groups(tiny.model, find_family(tiny.model.config))]
    for order in ORDERS:
        found = seen(tiny, order, batches)
        assert list(found) == keys
        assert all(math.isfinite(value) and value > 0 for value in found.values()), found
    assert all(torch.equal(value, before[key]) for key, value in tiny.model.state_dict().items())
    assert [module.training for module in tiny.model.modules()] == modes
    assert all(weight.grad is None and weight.requires_grad for weight in tiny.model.parameters())


@pytest.mark.parametrize("name", ["llava", "blip2_t5", "clip"])
def test_the_first_order_is_the_sum_over_batches_of_weight_times_gradient(name):
    tiny = tiny_model(name)
    batches = [tiny.inputs(2), tiny.inputs(3)]
    group = find_groups(tiny.model, find_family(tiny.model.config))[0]  # fused where the family fuses
    weights = [tiny.model.get_submodule(path).weight for path in {member.path for member in group.members}]
    expected = 0.0
    for batch in batches:
        tiny.model.zero_grad()
        output = tiny.model(**batch, **({"return_loss": True} if name == "clip" else {}))
        (len(batch["input_ids"]) * output.loss).backward()
        expected += sum((weight * weight.grad).abs().sum().item() for weight in weights)
    tiny.model.zero_grad()
    assert seen(tiny, "first-order", batches)[group.key] == pytest.approx(expected, rel=1e-3)


def test_both_find_the_same_groups_important():
    tiny = tiny_model("llava")
    batches = [tiny.inputs(1)]
    first = seen(tiny, "first-order", batches)
    drawn = [seen(tiny, "zeroth-order", batches, seed=seed) for seed in range(4)]
    ratios = [sum(one[key] for one in drawn) / 4 / first[key] for key in first]
    middle = sorted(ratios)[len(ratios) // 2]
    assert all(middle / 3 < ratio < 3 * middle for ratio in ratios), ratios


def test_the_seed_chooses_the_draws_and_the_same_one_gives_the_same_again():
    tiny = tiny_model("smolvlm")
    one, again, other = (seen(tiny, "zeroth-order", [tiny.inputs(1)], seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one != other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_given_back_to_the_bit_and_gives_numbers_of_the_same_size(dtype):
    tiny = tiny_model("llava")
    batches = [tiny.inputs(1)]
    wide = seen(tiny, "zeroth-order", batches)
    tiny.model.to(dtype)
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    halves = [{**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in batches]
    found = seen(tiny, "zeroth-order", halves)
    assert all(torch.equal(value, before[key]) for key, value in tiny.model.state_dict().items())
    assert 0.3 < sum(found.values()) / sum(wide.values()) < 3


def test_large_fp16_weights_do_not_overflow_in_the_size_of_their_change():
    assert root_mean_square(torch.full((4, 4), 300.0, dtype=torch.float16)) == 300


@pytest.mark.parametrize("order", ORDERS)
def test_a_loss_that_is_not_finite_is_refused_and_the_weights_are_given_back(order):
    tiny = tiny_model("llava")
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    bad = tiny.inputs(2)
    bad["pixel_values"][:] = math.inf
    with pytest.raises(CalibrationError, match=r"(is|are) not finite"):
        seen(tiny, order, [tiny.inputs(2), bad])
    assert all(torch.equal(value, before[key]) for key, value in tiny.model.state_dict().items())


@pytest.mark.parametrize("order", ORDERS)
def test_the_blocks_of_a_tower_are_a_group_too(order):
    tiny = tiny_model("blip2_t5")
    keys = [group.key for group in find_blocks(tiny.model, find_family(tiny.model.config))]
    found = seen(tiny, order, [tiny.inputs(2)], units="block")
    assert list(found) == keys and min(found.values()) > 0


def test_every_draw_is_made_once_however_many_batches_there_are():
    calls: list[int] = []
    for batches in (1, 3, 8):
        collector = STATISTICS["zeroth-order"].make()
        with collector.watch([Side("only", nn.ModuleList([nn.Linear(2, 2)]), ())]), torch.no_grad():
            for batch in range(batches):
                collector.perturb(batch, batches, lambda: calls.append(1) or torch.zeros(()))
    assert len(calls) == 3 * 2 * 8


def test_what_is_seen_of_whole_groups_is_asked_for_alone():
    with pytest.raises(ValueError, match="a reading of its own"):
        CalibrationOptions(("first", "first-order"))
