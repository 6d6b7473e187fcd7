"""A base held in 8 or 4 bits: what it computes, that none of it is kept in floats, and that low-rank layers learn."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from plans import random_plan
from tiny_models import EVERY, tiny_model
from torch import nn

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.models.families import Family, find_family
from slimvlm.compress.options import LowRank, RecoverOptions
from slimvlm.compress.recovery.adapters.frozen import FrozenLinear, freeze
from slimvlm.compress.recovery.adapters.recall import attach
from slimvlm.compress.recovery.checks import recipe_of
from slimvlm.compress.recovery.distillation.distiller import Distiller
from slimvlm.compress.recovery.distillation.recipe import make_stages, parse_recipe
from slimvlm.compress.slicing.apply import apply_plan

pytest.importorskip("torchao")


@lru_cache(maxsize=4)
def dense(name: str) -> nn.Module:
    return tiny_model(name).model.requires_grad_(False)


def family_of(name: str) -> Family:
    return find_family(dense(name).config)


@pytest.mark.parametrize("name", EVERY)
def test_low_rank_layers_on_a_frozen_base_learn_from_a_frozen_teacher(name: str) -> None:
    plan = random_plan(dense(name), seed=1)
    student = apply_plan(copy.deepcopy(dense(name)), plan).requires_grad_(False).eval()
    teacher = copy.deepcopy(dense(name)).eval()
    for model in (student, teacher):
        freeze(model, "int4")
        assert any(isinstance(module, FrozenLinear) for module in model.modules())
    adapted = attach(student, plan, None, LowRank(rank=1, recall=False))
    distiller = Distiller(student, teacher, family_of(name), parse_recipe("lpd")).train()
    (*_, last) = make_stages(distiller.family, distiller.depths, distiller.recipe)
    loss, _ = distiller(tiny_model(name).inputs(2), last)
    loss.backward()
    assert loss.isfinite()
    grads = {key: value.grad for key, value in adapted.named_parameters() if value.requires_grad}
    assert any(grad is not None and grad.any() for grad in grads.values())
    assert all(grad is None or grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_linear_is_that_of_its_codes_and_keeps_no_floats(form: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(dense("llava")).to(dtype)
    weights = {key: module.weight.clone() for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    freeze(model, form, [model.get_submodule(path) for path in family_of("llava").projector])
    frozen = {key: module for key, module in model.named_modules() if isinstance(module, FrozenLinear)}
    assert frozen.keys() < weights.keys()
    for key, module in frozen.items():
        given = torch.randn(2, 3, module.in_features, dtype=dtype, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
            output = module(given)
        output.sum().backward()
        assert saved == []
        floats = module.weight.dequantize()
        expected = nn.functional.linear(given.detach(), floats, module.bias)
        assert torch.allclose(output, expected, rtol=1e-2, atol=1e-2)
        assert torch.allclose(given.grad, floats.sum(0).to(dtype).expand_as(given), rtol=2e-2, atol=2e-2)
        assert (floats - weights[key]).abs().max() < weights[key].abs().max() / (7 if form == "int4" else 100)
    assert any(value.grad is None and value.dtype == dtype for value in model.parameters())


def test_a_frozen_linear_follows_autocast() -> None:
    model = copy.deepcopy(dense("llava"))
    freeze(model, "int8")
    module = next(one for one in model.modules() if isinstance(one, FrozenLinear))
    given = torch.randn(2, module.in_features, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(given)
    output.float().sum().backward()
    assert (output.dtype, given.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "full", "recover": "sft"}, "has nothing of the kind to hold"),
        ({"train": "projector", "recover": "sft"}, "has nothing of the kind to hold"),
        ({"recover_as": "q4"}, "give one of both"),
    ],
)
def test_a_frozen_base_is_refused_where_nothing_is_frozen(options: dict, message: str) -> None:
    with pytest.raises(UnsuitableOptionError, match=message):
        recipe_of(RecoverOptions(frozen="int8", **options))
    recipe_of(RecoverOptions(frozen="int8", train="full"))  # its teacher is
