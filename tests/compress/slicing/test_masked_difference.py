"""The check of a cut against the masked dense model: in fp32, whatever the weights are stored in."""

import copy

import pytest
import torch
from plans import random_plan
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.evaluation.equality import TOLERANCE, outputs, relative_difference
from slimvlm.compress.models.computing import ComputedIn, cast
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.slicing.mask import mask_plan
from slimvlm.compress.stages.slice import masked_difference

EXACT = TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_half_precision_weights_compute_what_the_model_in_fp32_computes(name: str, dtype: torch.dtype) -> None:
    tiny = tiny_model(name)
    model = cast(tiny.model.eval(), dtype)
    batch = tiny.inputs(2)
    with ComputedIn():
        found = outputs(model, batch)
    assert found.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert relative_difference(outputs(cast(model, torch.float32), batch), found) <= 1e-6


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_a_bf16_cut_equals_the_masked_model_as_closely_as_an_fp32_one(name: str) -> None:
    tiny = tiny_model(name)
    model = cast(tiny.model.eval(), torch.bfloat16)
    plan = random_plan(model)
    assert masked_difference(model, plan, tiny.inputs(2)) <= EXACT
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters_after


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_in_fp64_a_cut_differs_from_the_masked_model_by_nothing_that_counts(name: str) -> None:
    tiny = tiny_model(name)
    plan = random_plan(tiny.model)
    assert masked_difference(tiny.model.eval(), plan, tiny.inputs(2), torch.float64) <= EXACT / 100
    assert {parameter.dtype for parameter in tiny.model.parameters()} == {torch.float32}


def test_a_fault_of_the_cut_that_bf16_rounding_would_hide_is_found() -> None:
    tiny = tiny_model("llava")
    model = cast(tiny.model.eval(), torch.bfloat16)
    plan = random_plan(model)
    mask_plan(model, plan)
    cut = apply_plan(copy.deepcopy(model), plan)
    layer = cut.get_submodule("model.language_model.layers.0.mlp.down_proj")
    layer.weight.data[:, 0] *= 1.05
    rounded = relative_difference(outputs(model, half(tiny.inputs(2))), outputs(cut, half(tiny.inputs(2))))
    assert rounded <= TOLERANCE[torch.bfloat16]
    with ComputedIn():
        exact = relative_difference(outputs(model, tiny.inputs(2)), outputs(cut, tiny.inputs(2)))
    assert exact > 10 * EXACT


def half(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
