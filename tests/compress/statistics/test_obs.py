"""Greedy structured OBS: against the least-squares errors it stands for, and collected from every kind of attention."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.collectors import obs
from slimvlm.compress.statistics.collectors.obs import removal
from slimvlm.compress.statistics.rows import CalibrationOptions


def drawn(columns: int, rows: int, seed: int, shared: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Moments of inputs that have something in common, and a weight."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(3 * columns, columns)) + shared * generator.normal(size=(3 * columns, 1))
    return inputs.T @ inputs, generator.normal(size=(rows, columns))


def error(second: np.ndarray, weight: np.ndarray, kept: np.ndarray) -> float:
    """What the best weights on the columns `kept` lose of the output: the residual of a regression."""
    left = second - second[:, kept] @ np.linalg.solve(second[np.ix_(kept, kept)], second[kept])
    return float(np.trace(weight @ left @ weight.T))


def brute_force(second: np.ndarray, weight: np.ndarray, width: int, worth: np.ndarray) -> tuple[list[int], list[float]]:
    columns, order, costs = np.arange(len(second)), [], []
    units = columns // width
    while len(order) < len(worth):
        before = error(second, weight, ~np.isin(units, order))
        spent = {
            unit: worth[unit] * (error(second, weight, ~np.isin(units, [*order, unit])) - before)
            for unit in set(units.tolist()) - set(order)
        }
        order.append(min(spent, key=spent.__getitem__))
        costs.append(spent[order[-1]])
    return order, costs


def removed(second: np.ndarray, weight: np.ndarray, width: int, worth: np.ndarray) -> tuple[list[int], list[float]]:
    moments, gram = torch.tensor(second), torch.tensor(weight.T @ weight)
    order, costs = removal(moments, gram, width, torch.tensor(worth))
    return order.tolist(), costs.tolist()


@pytest.mark.parametrize("folded", [128, 4, 1])
@pytest.mark.parametrize(("width", "units"), [(1, 17), (3, 6)])
def test_every_step_takes_the_unit_whose_loss_the_others_can_make_up_for_most(
    monkeypatch: pytest.MonkeyPatch, width: int, units: int, folded: int
) -> None:
    monkeypatch.setattr(obs, "FOLDED", folded)
    for seed in range(3):
        second, weight = drawn(width * units, 5, seed, shared=1.0)
        worth = np.random.default_rng(seed).uniform(0.5, 2, units)
        order, costs = removed(second, weight, width, worth)
        expected = brute_force(second, weight, width, worth)
        assert order == expected[0]
        assert costs == pytest.approx(expected[1], rel=1e-8)


def test_all_costs_together_are_the_energy_of_the_output() -> None:
    second, weight = drawn(40, 7, seed=0, shared=2.0)
    assert sum(removed(second, weight, 1, np.ones(40))[1]) == pytest.approx(np.trace(weight @ second @ weight.T))


def test_units_that_have_nothing_in_common_leave_by_their_energy() -> None:
    generator = np.random.default_rng(0)
    second, weight = np.diag(generator.uniform(1, 9, 12)), generator.normal(size=(4, 12))
    energy = (weight**2).sum(0) * np.diag(second)
    order, costs = removed(second, weight, 1, np.ones(12))
    assert order == np.argsort(energy).tolist()
    assert costs == pytest.approx(np.sort(energy))


def test_of_units_that_repeat_each_other_one_stays_which_an_order_by_first_costs_would_take_too() -> None:
    second, weight = drawn(8, 6, seed=1)
    pairs = np.arange(16) % 8
    second = second[np.ix_(pairs, pairs)] + 1e-3 * np.trace(second) / 8 * np.eye(16)
    weight = np.concatenate([weight, weight], 1)
    order, _ = removed(second, weight, 1, np.ones(16))
    assert {unit % 8 for unit in order[:8]} == set(range(8))
    first = [error(second, weight, np.arange(16) != unit) for unit in range(16)]
    at_once, greedy = (
        [error(second, weight, ~np.isin(np.arange(16), order[:count])) for count in range(1, 13)]
        for order in (np.argsort(first, kind="stable"), order)
    )
    assert all(g <= a * (1 + 1e-9) for g, a in zip(greedy, at_once, strict=True))
    assert greedy[7] < at_once[7] / 20


@pytest.mark.parametrize("name", ["obs", "gate-obs"])
@pytest.mark.parametrize("unit", ["kv-group", "query-slot"])
def test_scores_of_a_model_are_those_of_its_inputs_whatever_the_bound_on_memory(name: str, unit: str) -> None:
    tiny, row = tiny_model("llava"), CRITERIA[name]
    family = find_family(tiny.model.config)
    groups, batches = find_groups(tiny.model, family, unit), [tiny.inputs(3)]
    read: dict[str, list[torch.Tensor]] = {}
    outputs = {group.key: next(member for member in group.members if member.dim == 1) for group in groups}
    handles = [
        tiny.model.get_submodule(output.path).register_forward_pre_hook(
            lambda _, inputs, key=key: read.setdefault(key, []).append(inputs[0].detach().flatten(0, -2).double())
        )
        for key, output in outputs.items()
    ]
    free = collect(tiny.model, family, groups, batches, row.calibration())
    for handle in handles:
        handle.remove()
    assert all(vector.ndim == 1 for vector in free.seen[name].values())
    tight = collect(tiny.model, family, groups, batches, row.calibration(grad_memory_bytes=4 * 64**2))
    assert tight.passes > free.passes == 1
    gates = collect(tiny.model, family, groups, batches, CRITERIA["gate"].calibration()).seen["gate"]
    for group in groups:
        linear, side = tiny.model.get_submodule(outputs[group.key].path), f"{outputs[group.key].path}:1"
        assert torch.allclose(tight.seen[name][side], free.seen[name][side], rtol=1e-5)
        inputs = torch.cat(read[group.key])
        inputs = inputs - inputs.mean(0) if linear.bias is not None else inputs
        second = inputs.T @ inputs
        second.diagonal().add_(0.01 * second.diagonal().mean())
        width = group.head_dim * (1 if group.unit == "query-slot" else group.indices_per_unit)
        gram = linear.weight.detach().double().T @ linear.weight.detach().double()
        count = len(second) // width
        own = torch.stack([(gram * second)[i : i + width, i : i + width].sum() for i in range(0, len(second), width)])
        worth = gates[side].view(count, width).sum(1) / own if name == "gate-obs" else torch.ones(count)
        order, costs = removal(second, gram, width, worth.double())
        found = free.seen[name][side].view(count, width).sum(1)[order]
        assert torch.allclose(found.double(), costs.cummax(0).values, rtol=1e-3)
        assert (found.diff() > 0).all()


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_every_unit_of_every_family_leaves_at_a_time_of_its_own(name: str) -> None:
    tiny = tiny_model(name)
    family = find_family(tiny.model.config)
    groups = find_groups(tiny.model, family)
    seen = collect(tiny.model, family, groups, [tiny.inputs(3)], CalibrationOptions(("obs", "gate-obs"))).seen
    for statistic, vectors in seen.items():
        row = CRITERIA[statistic]
        scores = score_groups(groups, row, SimpleNamespace(seen={statistic: vectors}))
        for group in groups:
            values = scores.values[group.key]
            assert values.isfinite().all() and (values >= 0).all(), group.key
            alive = values[values > 0].tolist()  # OPT has channels that no token of so few switches on
            assert len(set(alive)) == len(alive) > group.num_units / 2, group.key
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
