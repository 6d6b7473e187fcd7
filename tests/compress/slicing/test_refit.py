"""The least-squares refit: the optimum it claims to be, for every family, whatever the padding and the memory."""

from collections.abc import Callable, Sequence

import pytest
import torch
from plans import random_plan
from tiny_models import FACTORIES, Tiny, tiny_model

from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.compensation import COMPENSATIONS
from slimvlm.compress.slicing.cuts import find_cuts
from slimvlm.compress.slicing.refit import DAMPING, refit


def batches_of(tiny: Tiny, count: int = 3) -> list[Callable[[], dict[str, torch.Tensor]]]:
    """Batches of a few samples, every token of the text answered."""

    def batch(index: int) -> dict[str, torch.Tensor]:
        given = tiny.inputs(4)
        generator = torch.Generator().manual_seed(index)
        given["pixel_values"] = torch.randn(given["pixel_values"].shape, generator=generator)
        return {"labels": given["input_ids"].clone(), **given}

    return [lambda index=index: batch(index) for index in range(count)]


def refitted(tiny: Tiny, method: str = "refit", **options: object):
    family, plan = find_family(tiny.model.config), random_plan(tiny.model)
    groups = find_groups(tiny.model, family, plan.attention_unit)
    return COMPENSATIONS[method](tiny.model, family, groups, plan.keep, batches_of(tiny), **options), plan, groups


@pytest.mark.parametrize("method", [row.name for row in COMPENSATIONS.values() if row.place])
@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_no_output_projection_loses_more_than_by_the_cut_alone(name: str, method: str) -> None:
    tiny = tiny_model(name)
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    found, plan, groups = refitted(tiny, method)
    assert 0 <= found.lost < found.lost_by_cut
    assert all(value.equal(before[key]) for key, value in tiny.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())
    cut = {
        cut.path
        for group in groups
        for cut in find_cuts(group, torch.tensor(plan.keep[group.key]))
        if cut.columns is not None
    }
    assert set(found.weights) == cut
    found.put_into(apply_plan(tiny.model, plan))  # the shapes fit


def test_the_new_weight_is_the_ridge_solution_over_the_tokens_seen() -> None:
    tiny = tiny_model("llava")
    found, plan, _ = refitted(tiny)
    path, key = "model.language_model.layers.0.mlp.down_proj", "language.0.mlp"
    module, seen = tiny.model.get_submodule(path), []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        for batch in batches_of(tiny):
            tiny.model(**batch())
    handle.remove()
    x, kept = torch.cat(seen).double(), torch.tensor(plan.keep[key])
    inner = x[:, kept].T @ x[:, kept]
    ridge = DAMPING * x.square().sum(0).mean() * torch.eye(len(kept), dtype=torch.float64)
    weight = module.weight.detach().double()
    wanted = torch.linalg.solve(inner + ridge, x[:, kept].T @ x @ weight.T + ridge @ weight[:, kept].T).T
    assert (found.weights[path][0] - wanted).abs().max() < 1e-5
    assert found.weights[path][1] is None


def test_a_channel_that_repeats_a_kept_one_is_no_loss() -> None:
    tiny = tiny_model("llava")
    mlp = tiny.model.model.language_model.layers[0].mlp
    with torch.no_grad():
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight[20:].copy_(part.weight[:20])
    family = find_family(tiny.model.config)
    groups = [group for group in find_groups(tiny.model, family) if group.key == "language.0.mlp"]
    found = refit(tiny.model, family, groups, {"language.0.mlp": range(20)}, batches_of(tiny))
    assert found.lost_by_cut > 0.1
    assert found.lost < 1e-3


def test_a_constant_channel_moves_into_the_bias() -> None:
    tiny = tiny_model("llava")
    mlp = tiny.model.model.vision_tower.encoder.layers[0].mlp
    with torch.no_grad():
        mlp.fc1.weight[-1] = 0
        mlp.fc1.bias[-1] = 3.0
    family = find_family(tiny.model.config)
    groups = [group for group in find_groups(tiny.model, family) if group.key == "vision.0.mlp"]
    found = refit(tiny.model, family, groups, {"vision.0.mlp": range(mlp.fc1.out_features - 1)}, batches_of(tiny))
    assert found.lost_by_cut > 0
    assert found.lost < 1e-6


def test_the_bound_on_memory_changes_the_passes_and_not_the_result() -> None:
    tiny = tiny_model("blip2_t5")
    steps: dict[str, list[int]] = {"free": [], "tight": []}
    free, _, _ = refitted(tiny, progress=lambda _, done, total: steps["free"].append(total))
    tight, _, _ = refitted(tiny, memory=1, progress=lambda _, done, total: steps["tight"].append(total))
    assert steps["tight"][-1] > steps["free"][-1] == 3
    assert len(steps["tight"]) == steps["tight"][-1]
    for path, (weight, _) in free.weights.items():
        assert weight.equal(tight.weights[path][0])


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("name", ["blip2_t5", "qwen3_vl_moe"])
def test_held_moments_are_not_read_again_and_change_no_result(name: str, memory: int | None) -> None:
    tiny, held, readings = tiny_model(name), {}, []
    groups, keep = find_groups(tiny.model, family := find_family(tiny.model.config)), random_plan(tiny.model).keep
    all_in_one = [lambda: readings.append(1) or batches_of(tiny)[0]()]

    def refit_of(held: dict | None, **options: object):
        readings.clear()
        return refit(tiny.model, family, groups, keep, all_in_one, held=held, **options).weights, len(readings)

    first, once = refit_of(held, memory=memory)
    again, more = refit_of(held, memory=memory)
    assert (bool(held), more) == ((True, 0) if memory is None else (False, once))
    for path, (weight, bias) in refit_of(None)[0].items():
        for found in (first, again):
            torch.testing.assert_close(found[path][0], weight)
            assert (found[path][1] is None) == (bias is None)


def test_padding_is_not_fitted() -> None:
    tiny = tiny_model("llava")
    family, plan = find_family(tiny.model.config), random_plan(tiny.model)
    groups = [group for group in find_groups(tiny.model, family, plan.attention_unit) if group.tower == "language"]

    def weights(batches: Sequence[Callable[[], dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
        found = refit(tiny.model, family, groups, plan.keep, batches)
        return {path: weight for path, (weight, _) in found.weights.items()}

    def padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tail = {"input_ids": 5, "attention_mask": 0, "labels": -100}
        grown = {name: torch.nn.functional.pad(batch[name], (0, 7), value=fill) for name, fill in tail.items()}
        return {**batch, **grown}

    plain, long = weights(batches_of(tiny)), weights([lambda one=one: padded(one()) for one in batches_of(tiny)])
    for path in plain:
        assert (plain[path] - long[path]).abs().max() < 1e-4
