"""Gate squares: equal to a literal gate per unit, whatever the batch size, in every family."""

import pytest
import torch
from tiny_models import FACTORIES, tiny_model

from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.criteria.scoring import score_groups
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.loss import poorly_fitted_loss

OPTIONS = CRITERIA["gate"].calibration()


def split(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    count = len(batch["input_ids"])
    return [{name: value[i : i + size] for name, value in batch.items()} for i in range(0, count, size)]


def literal(model, groups, examples) -> dict[str, torch.Tensor]:
    """A gate in front of every output projection; one backward pass per example."""
    outputs = {group.key: next(member for member in group.members if member.dim == 1) for group in groups}
    gates = {group.key: torch.ones(group.size, requires_grad=True) for group in groups}
    for group in groups:
        gate, width = gates[group.key], outputs[group.key].width
        linear = model.get_submodule(outputs[group.key].path)
        linear.register_forward_pre_hook(lambda _, inputs, g=gate, w=width: (inputs[0] * g.repeat_interleave(w),))
    sums = {key: torch.zeros_like(gate) for key, gate in gates.items()}
    for example in examples:
        labels = example["labels"]
        logits = model(**{name: value for name, value in example.items() if name != "labels"}).logits
        loss = poorly_fitted_loss(logits[:, :-1], labels[:, 1:], None)
        found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
        for key, grad in zip(gates, found, strict=True):
            if grad is not None:
                sums[key] += grad**2
    return sums


@pytest.mark.parametrize("name", ["llava", "smolvlm", "paligemma"])
def test_gate_squares_equal_a_literal_gate_per_unit(name):
    tiny = tiny_model(name)
    family = find_family(tiny.model.config)
    groups = find_groups(tiny.model, family, "kv-group")
    batch = tiny.inputs(3)
    found = collect(tiny.model, family, groups, [batch], OPTIONS).seen["gate"]
    expected = literal(tiny.model, groups, split(batch, 1))
    for group in groups:
        output = next(member for member in group.members if member.dim == 1)
        sums = found[f"{output.path}:1"].view(-1, output.width).sum(1)
        torch.testing.assert_close(sums, expected[group.key], rtol=1e-4, atol=1e-9)


def test_gate_squares_do_not_depend_on_the_batch_size():
    tiny = tiny_model("llava")
    family = find_family(tiny.model.config)
    groups = find_groups(tiny.model, family)
    batch = tiny.inputs(4)
    one, four = (collect(tiny.model, family, groups, split(batch, size), OPTIONS).seen["gate"] for size in (1, 4))
    for key, values in one.items():
        torch.testing.assert_close(values, four[key], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_gate_scores_are_finite_in_every_family_and_leave_the_model_as_it_was(name):
    tiny = tiny_model(name)
    family = find_family(tiny.model.config)
    groups = find_groups(tiny.model, family)
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    scores = score_groups(groups, CRITERIA["gate"], collect(tiny.model, family, groups, [tiny.inputs(2)], OPTIONS))
    assert any(bool(values.any()) for values in scores.values.values())
    for group in groups:
        assert scores.values[group.key].isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in tiny.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_no_gradient_of_a_weight_is_formed():
    tiny = tiny_model("llava")
    family = find_family(tiny.model.config)
    groups = find_groups(tiny.model, family)
    formed = []
    for parameter in tiny.model.parameters():
        parameter.register_post_accumulate_grad_hook(formed.append)
    collect(tiny.model, family, groups, [tiny.inputs(2)], OPTIONS)
    assert formed == []
