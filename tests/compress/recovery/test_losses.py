"""Losses: golden numbers of the specification, torch's own formulas, and that padding never counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimvlm.compress.recovery.distillation import losses

E_S, E_T = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 1], [0, 0]])  # G9
LN = math.log


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def pairs(draw, ndim: int = 2, largest: float = 30.0):
    shape = [draw(st.integers(1, 6)) for _ in range(ndim)]
    scale = draw(st.floats(0.01, largest))
    return noise(*shape, seed=draw(st.integers(0, 99))) * scale, noise(*shape, seed=draw(st.integers(100, 199))) * scale


def test_golden_feature_losses():
    assert losses.normalised_error(E_S, E_T).item() == pytest.approx(0.25, abs=1e-6)
    assert 1e6 * losses.normalised_error(E_S, E_T).item() == pytest.approx(250_000, rel=1e-6)
    assert losses.feature_distance(E_S, E_T).item() == pytest.approx(0.5, abs=1e-6)


def test_golden_divergence():
    student, teacher = torch.tensor([[0, 0], [0, LN(4)]]), torch.tensor([[LN(3), 0], [0, 0]])
    assert losses.divergence(student, teacher).item() == pytest.approx(0.176978, abs=1e-6)


@given(pairs(3))
def test_the_feature_distance_is_one_minus_the_cosine_of_the_flattened_tensors(pair):
    student, teacher = pair
    cosine = F.cosine_similarity(student.double().flatten(), teacher.double().flatten(), dim=0)
    assert losses.feature_distance(student, teacher).item() == pytest.approx(1 - cosine.item(), abs=1e-5)


@given(pairs(3), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_feature_distance_ignores_scale_and_is_zero_for_equal_tensors(pair, left, right):
    student, teacher = pair
    expected = losses.feature_distance(student, teacher).item()
    assert losses.feature_distance(student * left, teacher * right).item() == pytest.approx(expected, abs=1e-5)
    assert losses.feature_distance(student, student.clone()).item() == 0
    assert expected >= 0


@given(pairs(3), st.integers(1, 4), st.sampled_from([0.0, 7.0, float("inf"), float("nan")]))
def test_whatever_stands_in_padding_changes_neither_loss_nor_gradient(pair, padding, filler):
    student, teacher = pair
    rows, tokens, width = student.shape
    mask = torch.cat([torch.ones(rows, tokens), torch.zeros(rows, padding)], 1).bool()
    rest = torch.full((rows, padding, width), filler)
    for loss in (losses.feature_distance, losses.squared_error):
        bare = student.clone().requires_grad_()
        padded = torch.cat([student, rest], 1).requires_grad_()
        expected = loss(bare, teacher)
        found = loss(padded, torch.cat([teacher, rest], 1), mask)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        expected.backward()
        found.backward()
        torch.testing.assert_close(padded.grad[:, :tokens], bare.grad, rtol=1e-4, atol=1e-6)
        assert not padded.grad[:, tokens:].any()


@given(pairs(2), st.floats(0.25, 8), st.booleans())
def test_the_divergence_is_never_negative_and_zero_for_equal_logits(pair, temperature, reverse):
    student, teacher = pair
    found = losses.divergence(student, teacher, temperature, reverse=reverse).item()
    assert math.isfinite(found)
    assert found >= -1e-6 * temperature**2
    assert losses.divergence(student, student.clone(), temperature, reverse=reverse).item() == 0


@given(pairs(2, largest=5), st.floats(0.25, 8), st.booleans())
def test_divergence_and_its_gradient_are_those_of_torch(pair, temperature, reverse):
    student, teacher = (value.double() for value in pair)
    own, reference = student.float().requires_grad_(), student.requires_grad_()
    student_log, teacher_log = (torch.log_softmax(value / temperature, -1) for value in (reference, teacher))
    first, second = (teacher_log, student_log) if reverse else (student_log, teacher_log)
    expected = F.kl_div(first, second, log_target=True, reduction="batchmean") * temperature**2
    expected.backward()
    found = losses.divergence(own, teacher.float(), temperature, reverse=reverse)
    (3 * found).backward()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.grad, 3 * reference.grad.float(), rtol=1e-3, atol=1e-5)


@given(pairs(3, largest=3))
def test_the_gradient_of_the_feature_distance_is_that_of_the_cosine(pair):
    student, teacher = pair
    mask = torch.arange(student.shape[0] * student.shape[1]).view(student.shape[:2]) % 3 != 1
    own, reference = student.clone().requires_grad_(), student.double().requires_grad_()
    expected = 1 - F.cosine_similarity(reference[mask].flatten(), teacher.double()[mask].flatten(), dim=0)
    expected.backward()
    losses.feature_distance(own, teacher, mask).backward()
    torch.testing.assert_close(own.grad, reference.grad.float(), rtol=1e-3, atol=1e-5)


@given(pairs(2, largest=8), st.lists(st.integers(-1, 5), min_size=6, max_size=6))
def test_cross_entropy_and_its_gradient_are_those_of_torch(pair, labels):
    own, reference = pair[0].clone().requires_grad_(), pair[0].double().requires_grad_()
    labels = torch.tensor([label if label < own.shape[1] else 0 for label in labels[: len(own)]])
    labels[labels < 0] = -100
    if (labels == -100).all():
        labels[0] = 0
    found, expected = losses.cross_entropy(own, labels), F.cross_entropy(reference, labels)
    (2 * found).backward()
    (2 * expected).backward()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own.grad, reference.grad.float(), rtol=1e-4, atol=1e-6)


def test_cross_entropy_without_a_label_is_zero_and_so_is_its_gradient():
    logits, labels = noise(5, 7).requires_grad_(), torch.tensor([1, -100, 6, 0, -100])
    nothing = losses.cross_entropy(logits, torch.full((5,), -100))
    nothing.backward()
    assert (nothing.item(), logits.grad.abs().sum().item()) == (0, 0)
    assert losses.cross_entropy(noise(0, 7), labels[:0]).item() == 0
    assert losses.divergence(noise(0, 7), noise(0, 7)).item() == 0


def test_squared_error_is_the_mean_over_elements():
    student, teacher = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    torch.testing.assert_close(losses.squared_error(student, teacher), F.mse_loss(student, teacher))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = F.mse_loss(student[mask], teacher[mask])
    torch.testing.assert_close(losses.squared_error(student, teacher, mask), expected)


def test_similarities_are_compared_along_rows_and_columns():
    student, teacher = noise(3, 3), noise(3, 3, seed=1)
    both = losses.divergence(student, teacher) + losses.divergence(student.T, teacher.T)
    torch.testing.assert_close(losses.contrast_divergence(student, teacher), both / 2)
    torch.testing.assert_close(losses.contrast_divergence(student.T, teacher.T), both / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_and_the_gradient_comes_back_in_its_own_dtype(dtype):
    student, teacher = noise(4, 50, dtype=dtype), noise(4, 50, seed=1, dtype=dtype)
    for loss in (losses.divergence, losses.feature_distance, losses.squared_error):
        own, wide = student.clone().requires_grad_(), student.float().requires_grad_()
        found, expected = loss(own, teacher), loss(wide, teacher.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        (found * 1024).backward()  # as a gradient scaler does
        (expected * 1024).backward()
        assert own.grad.dtype == dtype
        torch.testing.assert_close(own.grad.float(), wide.grad, rtol=2e-2, atol=2e-2 * wide.grad.abs().max().item())


def test_a_tensor_of_zeros_gives_a_finite_distance_and_gradient():
    student = torch.zeros(2, 3).requires_grad_()
    losses.feature_distance(student, noise(2, 3)).backward()
    assert torch.isfinite(student.grad).all()


def test_tensors_of_two_shapes_are_refused():
    for loss in (losses.feature_distance, losses.divergence, losses.squared_error):
        with pytest.raises(ValueError, match=r"of student and teacher differ: \(2, 3\) and \(2, 4\)"):
            loss(noise(2, 3), noise(2, 4))


@pytest.mark.parametrize("loss", ["divergence", "cross_entropy"])
def test_a_loss_of_logits_keeps_one_tensor_of_their_size_and_dtype_for_the_backward(loss):
    kept = []
    logits = noise(8, 100, dtype=torch.bfloat16).requires_grad_()
    other = {"divergence": noise(8, 100), "cross_entropy": torch.arange(8)}[loss]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        getattr(losses, loss)(logits, other)
    assert [(tensor.dtype, tensor.numel()) for tensor in kept if tensor.numel() > 8] == [(torch.bfloat16, 800)]
