"""Training for few bits: a student computes with the weights of its export, learns past them, and keeps its own."""

from __future__ import annotations

import pytest
import torch
from recalled import make_case, randomise, trainable
from tiny_models import FACTORIES

from slimvlm.compress.models.families import find_family
from slimvlm.compress.options import ROUNDED
from slimvlm.compress.recovery.adapters.recall import merge
from slimvlm.compress.recovery.adapters.rounding import round_blocks, rounded, rounded_modules


@pytest.mark.parametrize("name", FACTORIES)
def test_a_student_computes_with_the_rounded_weights_of_what_merging_makes(tmp_path, name):
    case = make_case(tmp_path, name)
    adapted = randomise(case.attach())
    plain = case.outputs()
    with rounded(case.model, "q2"):
        found = case.outputs()
        answer = case.model(**case.tiny.inputs(2))
        (answer.logits_per_image if find_family(case.model.config).contrastive else answer.logits).sum().backward()
    assert any(factor.grad.abs().max() > 0 for factor in trainable(case.model).values() if factor.grad is not None)
    assert torch.equal(case.outputs(), plain)  # nothing of it stays
    merged = merge(adapted)
    with torch.no_grad():
        for weight in {module.weight for module in rounded_modules(merged)}:
            weight.copy_(round_blocks(weight, ROUNDED["q2"]))
    wanted = case.outputs(merged)
    assert (wanted - plain).abs().max() > 1e-2
    assert (found - wanted).abs().max() <= 1e-4
