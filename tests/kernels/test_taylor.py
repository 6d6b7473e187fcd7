"""Saliency sums: the golden example G1, and the CPU path against the reference."""

import pytest
import torch

from slimvlm.kernels import squared_sums, taylor_sums
from slimvlm.kernels.taylor import VARIANTS, cpu, reference

SHAPES = [(1, 1), (7, 5), (63, 1000), (1030, 517), (3, 300_000), (0, 4), (4, 0)]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over the RMS of the expectation: free of scale."""
    if not expected.numel():
        return 0.0
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30))


def operands(shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, grad, square = (torch.randn(shape, generator=generator) for _ in range(3))
    return [weight.to(dtypes[0]), grad.to(dtypes[1]), square.abs().to(dtypes[1])]


def test_golden_g1_sums_of_every_variant():
    weight = torch.tensor([[1, -2, 3], [0.5, 0, -1]])
    grads = torch.tensor([[[0.1, 0.2, -0.3], [0.4, 0.5, 0.6]], [[-0.1, 0.2, 0.1], [0.2, -0.5, 0.2]]])
    total, square = grads.sum(0), grads.square().mean(0)
    assert taylor_sums(weight, total, 0).tolist() == pytest.approx([1.4, 1.1])
    assert taylor_sums(weight, total, 1).tolist() == pytest.approx([0.3, 0.8, 1.4])
    assert taylor_sums(weight, total, 0, variant="vectorized").tolist() == pytest.approx([1.4, 0.5])
    assert taylor_sums(weight, None, 0, variant="second", square=square).tolist() == pytest.approx([0.62, 0.225])
    assert taylor_sums(weight, total, 0, variant="mix", square=square).tolist() == pytest.approx([1.71, 1.1875])


def test_squared_sums_add_up_squares_of_weight_times_gradient():
    weight, grad = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[2.0, -1.0], [0.5, 4.0]])
    assert squared_sums(weight, grad, 0).tolist() == [8.0, 18.25]
    assert squared_sums(weight, grad, 1).tolist() == [6.25, 20.0]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("variant", [*VARIANTS, "fisher"])
def test_cpu_path_equals_the_reference(variant, dim, shape, dtypes):
    weight, grad, square = operands(shape, dtypes)
    found = cpu.saliency_sums(weight, grad, dim, variant, square)
    expected = reference.saliency_sums(weight, grad, dim, variant, square)
    assert found.dtype == torch.float32 and found.shape == (shape[dim],)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("variant", [*VARIANTS, "fisher"])
def test_strides_do_not_matter(variant):
    weight, grad, square = operands((90, 41), DTYPES[0])
    views = [tensor.t().contiguous().t() for tensor in (weight, grad, square)]
    sliced = [torch.stack([tensor, tensor], dim=2)[:, :, 0] for tensor in (weight, grad, square)]
    for dim in (0, 1):
        expected = reference.saliency_sums(weight, grad, dim, variant, square)
        for other in (views, sliced):
            found = cpu.saliency_sums(other[0], other[1], dim, variant, other[2])
            assert relative_error(found, expected) < 1e-5


def test_the_comparison_notices_one_changed_weight():
    weight, grad, _ = operands((64, 64), DTYPES[0])
    expected = reference.saliency_sums(weight, grad, 0, "first", None)
    weight[3, 5] += 1
    assert relative_error(cpu.saliency_sums(weight, grad, 0, "first", None), expected) > 1e-4


def test_bf16_products_are_not_rounded_to_bf16():
    weight, grad, _ = operands((8, 4096), DTYPES[1])
    exact = (weight.double() * grad.double()).abs().sum(1)
    assert relative_error(taylor_sums(weight, grad, 0).double(), exact) < 1e-6


def test_misuse_names_both_shapes():
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"grad \(3, 2\) must match weight \(2, 3\)"):
        taylor_sums(weight, torch.ones(3, 2), 0)
    with pytest.raises(ValueError, match="choose one of first, vectorized, second, mix"):
        taylor_sums(weight, weight, 0, variant="third")
    with pytest.raises(ValueError, match="needs 'square'"):
        taylor_sums(weight, weight, 0, variant="mix")
    with pytest.raises(ValueError, match="dim must be 0"):
        squared_sums(weight, weight, 2)
    with pytest.raises(ValueError, match="must be a matrix"):
        squared_sums(torch.ones(3), torch.ones(3), 0)
