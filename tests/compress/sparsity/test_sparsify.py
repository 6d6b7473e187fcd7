"""Zeros in single weights: goldens W1 and S1 of ECoFLaP's specification, and what holds for every family."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from streaming import pair
from tiny_models import EVERY, FACTORIES, IMAGE_TOKEN, tiny_model

from slimvlm.compress.errors import CalibrationError, InfeasibleBudgetError, UnsuitableOptionError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import count_parameters, find_groups
from slimvlm.compress.models.streaming import lazy
from slimvlm.compress.sparsity import sparsegpt, wanda
from slimvlm.compress.sparsity.counts import linears_of
from slimvlm.compress.sparsity.rules import RULES, Zeros
from slimvlm.compress.sparsity.sparsify import Asked, Sparsified, sparsify
from slimvlm.compress.statistics.rows import token_rule

W1 = torch.tensor([[4, -1, 2, -3], [0.5, 6, -1, 2.5], [-2, 1, 8, 0.25]])
NORMS = torch.tensor([1, 2.5, 2, 0.5]).sqrt()  # any multiple of it ranks alike
S1 = torch.tensor([[1, -0.5, 0.25, 2], [0.3, 0.8, -1.2, 0.1]])
TOKENS = torch.tensor([[1.0, 2, 0, 1], [0, 1, 1, 0], [2, 0, 1, 1], [1, 1, 0, 3]])
EXACT = partial(sparsegpt.prune, S1, TOKENS.T @ TOKENS)


def sparsified(name: str, asked: Asked, **changes) -> tuple[torch.nn.Module, Sparsified]:
    tiny = tiny_model(name)
    batches = [{**tiny.inputs(count), **changes} for count in (2, 3)]
    return tiny.model, sparsify(tiny.model, find_family(tiny.model.config), batches, asked)


@pytest.mark.parametrize("zeros", [Zeros(2), Zeros(2, 4)])
def test_golden_w1_wanda_takes_the_smallest_of_every_row(zeros):
    expected = W1.clone()
    for row, columns in enumerate(([1, 3], [0, 2], [1, 3])):
        expected[row, columns] = 0
    assert torch.equal(wanda.prune(W1, NORMS, zeros), expected)


def test_wanda_takes_the_first_of_equal_ones_and_nothing_where_nothing_is_asked():
    ones = torch.ones(2, 4)
    assert wanda.prune(ones, torch.ones(4), Zeros(1)).tolist() == [[0, 1, 1, 1]] * 2
    assert torch.equal(wanda.prune(W1, NORMS, Zeros(0)), W1)


def test_golden_s1_sparsegpt_moves_what_is_left():
    # The published code takes one more weight of a block than its sparsity of a half says: 5 of 8, 3 of 4.
    whole = EXACT(Zeros(2.5), 0.0, 4)
    torch.testing.assert_close(whole, torch.tensor([[0, 0, 0, 2.340909], [0, 0.788, -0.968, 0]]), atol=1e-5, rtol=0)
    halves = EXACT(Zeros(3), 0.0, 2)
    torch.testing.assert_close(halves, torch.tensor([[0, 0, 0, 2.340909], [0, 0.788, 0, 0]]), atol=1e-5, rtol=0)
    damped = EXACT(Zeros(2.5), 0.01, 4)
    expected = torch.tensor([[0, 0, 0, 2.338983], [0, 0.790391, -0.975593, 0]])
    torch.testing.assert_close(damped, expected, atol=1e-5, rtol=0)


def test_sparsegpt_loses_less_of_the_outputs_than_the_same_zeros_alone():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(300, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight, products = torch.randn(16, 24, generator=generator), mixed.T @ mixed
    for zeros in (Zeros(12), Zeros(2, 4)):
        pruned = sparsegpt.prune(weight, products, zeros, columns=8)
        alone = weight.masked_fill(pruned == 0, 0)
        lost, lost_alone = (((weight - one) @ mixed.T).square().sum() for one in (pruned, alone))
        assert (pruned == 0).sum() == 16 * 12 and lost < 0.8 * lost_alone


def test_features_that_are_always_zero_read_nothing_and_go_first():
    tokens = TOKENS.clone()
    tokens[:, 1] = 0
    pruned = sparsegpt.prune(S1, tokens.T @ tokens, Zeros(1))
    assert pruned[:, 1].tolist() == [0, 0] and (pruned != 0).sum() == 6


def test_inputs_that_are_not_finite_are_refused_and_dependent_ones_are_not():
    with pytest.raises(CalibrationError, match="not finite"):
        sparsegpt.prune(S1, torch.full((4, 4), torch.inf), Zeros(2))
    assert sparsegpt.prune(S1, torch.ones(4, 4), Zeros(2), damping=0.0).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FACTORIES)
def test_so_much_of_every_family_becomes_zero_as_was_asked_and_nothing_else_changes(name, rule):
    before = {key: value.clone() for key, value in tiny_model(name).model.state_dict().items()}
    model, done = sparsified(name, Asked(ratio=0.2, rule=rule))
    groups = find_groups(model, find_family(model.config))
    paths = {path for group in groups for path in linears_of(model, group)}
    assert done.zeros == pytest.approx(0.2, abs=48 / count_parameters(model))
    assert set(done.groups) == {group.key for group in groups}
    assert max(done.groups.values()) - min(done.groups.values()) < 1 / 16
    for key, value in model.state_dict().items():
        if key.removesuffix(".weight") not in paths:
            assert torch.equal(value, before[key]), key
        elif rule == "wanda":
            assert torch.equal(value, before[key].masked_fill(value == 0, 0)), key
        assert value.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", FACTORIES)
def test_two_of_every_four_neighbours_of_every_family_become_zero(name, rule):
    model, done = sparsified(name, Asked("2:4", rule=rule))
    for group in find_groups(model, find_family(model.config)):
        for linear in linears_of(model, group).values():
            assert ((linear.weight.view(len(linear.weight), -1, 4) == 0).sum(-1) == 2).all()
    assert set(done.groups.values()) == {0.5}


@pytest.mark.parametrize("allocator", ["ecoflap", "ecoflap-first"])
def test_ecoflap_shares_out_what_is_kept_within_its_cap(allocator):
    model, done = sparsified("llava", Asked(ratio=0.3, allocator=allocator))
    sizes = [sum(one.weight.numel() for one in linears_of(model, group).values()) for group in groups_of(model)]
    mean = 0.3 * count_parameters(model) / sum(sizes)
    assert done.zeros == pytest.approx(0.3, abs=1e-3)
    assert max(done.groups.values()) <= mean + 0.1 + 1 / 16 and min(done.groups.values()) < mean - 0.02
    ranked = sorted(done.groups, key=lambda key: done.importance[key] / sizes[list(done.groups).index(key)])
    assert done.groups[ranked[0]] > done.groups[ranked[-1]]


def groups_of(model):
    return find_groups(model, find_family(model.config))


@pytest.mark.parametrize("name", ["llava", "blip2_t5", "qwen2_5_vl"])
def test_a_block_is_looked_at_with_the_zeros_of_those_before_it_and_its_own_positions(name):
    tiny = tiny_model(name)
    family, batches = find_family(tiny.model.config), [tiny.inputs(2)]
    read = []
    last = groups_of(tiny.model)[-1]
    linear = tiny.model.get_submodule(last.members[-1].path)
    linear.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].clone()))
    with torch.no_grad():
        tiny.model(**batches[0])
        weight = linear.weight.clone()
        sparsify(tiny.model, family, batches, Asked(ratio=0.3))
    norms = read[-2].flatten(0, 1).norm(dim=0)
    assert len(read) == 3  # as it was, as it is looked at, and with zeros of its own
    assert not torch.allclose(norms, read[0].flatten(0, 1).norm(dim=0), rtol=1e-3)
    zeros = int((linear.weight[0] == 0).sum())
    assert torch.equal(linear.weight, wanda.prune(weight, norms, Zeros(zeros)))


@pytest.mark.parametrize("name", EVERY)
def test_a_model_read_block_by_block_gets_the_zeros_of_the_whole_one(name, tmp_path):
    whole, streamed = pair(tmp_path, name)
    rule = "sparsegpt" if name == "llava" else "wanda"
    family, batches = find_family(whole.model.config), [whole.inputs(2), whole.inputs(1)]
    asked = Asked(ratio=0.2, rule=rule, tokens=token_rule("atv" if name == "qwen2_vl" else "all"))
    left, right = (sparsify(one.model, family, batches, asked) for one in (whole, streamed))
    assert right.zeros == pytest.approx(left.zeros, abs=1e-3)
    found = lazy.read(list(streamed.model.parameters()))
    for (path, weight), other in zip(whole.model.named_parameters(), found, strict=True):
        assert ((weight == 0) != (other == 0)).sum() <= 0.01 * weight.numel() + 1, path
        assert (weight - other).norm() <= 0.1 * weight.norm(), path
    assert any(isinstance(weight, lazy.Lazy) for weight in streamed.model.parameters())


def test_padding_is_not_read():
    tiny = tiny_model("llava")
    family, short = find_family(tiny.model.config), tiny.inputs(2)
    padded = {
        key: torch.cat([value, torch.full((2, 3), {"labels": -100}.get(key, 0))], 1) if value.ndim == 2 else value
        for key, value in short.items()
    }
    other = tiny_model("llava").model
    sparsify(tiny.model, family, [short], Asked(ratio=0.3))
    sparsify(other, family, [padded], Asked(ratio=0.3))
    same = [
        ((one == 0) == (two == 0)).float().mean()
        for one, two in zip(tiny.model.parameters(), other.parameters(), strict=True)
    ]
    assert min(same) > 0.98  # equal but for what is rounded


def test_what_no_cut_can_give_is_refused_before_the_data_is_read():
    tiny = tiny_model("llava")
    family = find_family(tiny.model.config)
    with pytest.raises(
        InfeasibleBudgetError, match=r"ratio 0.99 cannot be reached: .* hold 0\.\d{4} of all parameters"
    ):
        sparsify(tiny.model, family, [lambda: pytest.fail("read")], Asked(ratio=0.99))
    groups_of(tiny.model)
    path = groups_of(tiny.model)[0].members[0].path
    odd = torch.nn.Linear(6, 32)
    tiny.model.set_submodule(path, odd)
    with pytest.raises(
        UnsuitableOptionError, match=rf"{path} reads 6 features, no multiple of 4; use --sparsity unstr"
    ):
        sparsify(tiny.model, family, [lambda: pytest.fail("read")], Asked("2:4"))


def test_half_precision_keeps_its_zeros():
    tiny = tiny_model("llava")
    tiny.model.to(torch.bfloat16)
    batch = tiny.inputs(2)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    done = sparsify(tiny.model, find_family(tiny.model.config), [batch], Asked(ratio=0.2, rule="sparsegpt"))
    assert done.zeros == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_atv_chooses_the_tokens_of_every_block_with_the_zeros_of_those_before_it(name):
    asked = Asked(ratio=0.3, tokens=token_rule("atv(0.5)"))
    done, _ = sparsified(name, asked)
    other, _ = sparsified(name, Asked(ratio=0.3))
    tiny = tiny_model(name)
    heard, path, block = {}, "model.language_model.layers.1.mlp.down_proj", "model.language_model.layers.1"
    state = {key: value for key, value in done.state_dict().items() if block not in key}
    tiny.model.load_state_dict(state, strict=False)  # all before the last block with their zeros
    module = tiny.model.get_submodule(path)
    zeros = asked.zeros(tiny_model(name).model, find_groups(tiny.model, find_family(tiny.model.config)), None)[path]

    def hear(_, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        heard.setdefault("drift", []).append(1 - torch.cosine_similarity(before, after, dim=-1))

    handles = [
        tiny.model.get_submodule(block).register_forward_hook(hear, with_kwargs=True),
        module.register_forward_pre_hook(lambda _, inputs: heard.setdefault("read", []).append(inputs[0].detach())),
    ]
    batches = [tiny.inputs(count) for count in (2, 3)]
    with torch.no_grad():
        for batch in batches:
            tiny.model(**batch)
    for handle in handles:
        handle.remove()
    images = [batch["input_ids"] == IMAGE_TOKEN for batch in batches]
    turned = torch.cat([drift[image] for drift, image in zip(heard["drift"], images, strict=True)])
    rho = min(1, 0.5 * turned.mean().item())
    rows = []
    for read, drift, image in zip(heard["read"], heard["drift"], images, strict=True):
        for sample in range(len(read)):
            taken = ~image[sample]
            best = sorted(image[sample].nonzero()[:, 0].tolist(), key=lambda at: -drift[sample, at].item())
            taken[best[: round(rho * int(taken.sum()))]] = True
            rows.append(read[sample][taken])
    assert sum(map(len, rows)) < sum(image.numel() for image in images)
    expected = wanda.prune(module.weight.detach(), torch.cat(rows).norm(dim=0), zeros)
    assert torch.equal(done.get_parameter(f"{path}.weight"), expected)
    assert not torch.equal(other.get_parameter(f"{path}.weight"), expected)


def test_pools_are_refused_where_images_and_text_are_read_apart():
    tiny = tiny_model("clip")
    with pytest.raises(UnsuitableOptionError, match="clip reads images and texts apart"):
        sparsify(tiny.model, find_family(tiny.model.config), [tiny.inputs(2)], Asked(tokens=token_rule("text")))
