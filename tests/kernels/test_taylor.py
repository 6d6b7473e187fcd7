"""Saliency sums: the golden example G1, and every path against the reference."""

import pytest
import torch

from slimvlm.kernels import squared_sums, taylor_sums, taylor_sums_batch
from slimvlm.kernels.taylor import VARIANTS, Operands, reference

SMALL = [(1, 1), (7, 5), (40, 264), (0, 4), (4, 0)]
LARGE = [(63, 1000), (130, 517), (3, 30_000)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over the RMS of the expectation: free of scale; NaN is infinite."""
    if not expected.numel():
        return 0.0
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)
    return float(error.nan_to_num(nan=torch.inf))


def operands(shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[1])
    weight, grad, square = (torch.randn(shape, generator=generator) for _ in range(3))
    return [weight.to(dtypes[0]), grad.to(dtypes[1]), square.abs().to(dtypes[1])]


def layouts(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The same matrices as they lie, transposed in memory, and with gaps; and a mix of them."""
    turned = [tensor.t().contiguous().t() for tensor in tensors]
    gaps = [torch.stack([tensor, tensor], dim=2)[:, :, 0] for tensor in tensors]
    return [tensors, turned, gaps, [tensors[0], turned[1], gaps[2]]]


def worst(path, batch: list[Operands], variant: str) -> float:
    expected = reference.saliency_sums(batch, variant)
    moved = [Operands(*map(path.put, matrix[:3]), matrix.dim) for matrix in batch]
    found = path.module("taylor").saliency_sums(moved, variant)
    for one, other, matrix in zip(found, expected, batch, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape == (matrix.weight.shape[matrix.dim],)
    return max(relative_error(one.cpu(), other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("variant", [*VARIANTS, "fisher"])
def test_a_batch_of_all_shapes_equals_the_reference(path, variant, dtypes):
    shapes = SMALL + LARGE if (variant, dtypes) == ("first", DTYPES[0]) else SMALL
    batch = [Operands(*operands(shape, dtypes), dim) for shape in shapes for dim in (0, 1)]
    assert worst(path, batch, variant) < 1e-5


@pytest.mark.parametrize("variant", ["first", "mix"])
def test_strides_do_not_matter(path, variant):
    batch = [
        Operands(*tensors, dim)
        for shape in ((64, 40), (33, 41))
        for tensors in layouts(operands(shape, DTYPES[0]))
        for dim in (0, 1)
    ]
    assert worst(path, batch, variant) < 1e-5


def test_memory_that_is_not_aligned_to_vectors_is_read_right(path):
    batch = []
    for offset in (1, 2, 4):
        tensors = [torch.randn(64 * 64 + offset)[offset:].view(64, 64) for _ in range(3)]
        batch += [Operands(*tensors, dim) for dim in (0, 1)]
    assert worst(path, batch, "first") < 1e-5


def test_every_layout_of_a_long_row_equals_the_reference(path):
    batch = [Operands(*tensors, dim) for tensors in layouts(operands((9, 520), DTYPES[1])) for dim in (0, 1)]
    assert worst(path, batch, "first") < 1e-5


def test_the_comparison_notices_one_changed_weight(path):
    weight, grad, square = operands((64, 64), DTYPES[0])
    batch = [Operands(weight, grad, square, 0)]
    expected = reference.saliency_sums(batch, "first")[0]
    weight[3, 5] += 1
    moved = [Operands(path.put(weight), path.put(grad), path.put(square), 0)]
    found = path.module("taylor").saliency_sums(moved, "first")[0].cpu()
    assert relative_error(found, expected) > 1e-4


def test_the_comparison_notices_a_value_that_was_never_written():
    expected = torch.ones(5)
    found = torch.empty(5)
    found[:4] = 1
    assert relative_error(found, expected) == torch.inf


def test_golden_g1_sums_of_every_variant():
    weight = torch.tensor([[1, -2, 3], [0.5, 0, -1]])
    grads = torch.tensor([[[0.1, 0.2, -0.3], [0.4, 0.5, 0.6]], [[-0.1, 0.2, 0.1], [0.2, -0.5, 0.2]]])
    total, square = grads.sum(0), grads.square().mean(0)
    assert taylor_sums(weight, total, 0).tolist() == pytest.approx([1.4, 1.1])
    assert taylor_sums(weight, total, 1).tolist() == pytest.approx([0.3, 0.8, 1.4])
    assert taylor_sums(weight, total, 0, variant="vectorized").tolist() == pytest.approx([1.4, 0.5])
    assert taylor_sums(weight, None, 0, variant="second", square=square).tolist() == pytest.approx([0.62, 0.225])
    assert taylor_sums(weight, total, 0, variant="mix", square=square).tolist() == pytest.approx([1.71, 1.1875])
    rows, columns = taylor_sums_batch([weight, weight], [total, total], [0, 1])
    assert rows.tolist() == pytest.approx([1.4, 1.1]) and columns.tolist() == pytest.approx([0.3, 0.8, 1.4])


def test_squared_sums_add_up_squares_of_weight_times_gradient():
    weight, grad = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[2.0, -1.0], [0.5, 4.0]])
    assert squared_sums(weight, grad, 0).tolist() == [8.0, 18.25]
    assert squared_sums(weight, grad, 1).tolist() == [6.25, 20.0]


def test_bf16_products_are_not_rounded_to_bf16():
    weight, grad, _ = operands((8, 4096), DTYPES[1])
    exact = (weight.double() * grad.double()).abs().sum(1)
    assert relative_error(taylor_sums(weight, grad, 0).double(), exact) < 1e-6


def test_a_parameter_is_scored_without_a_graph():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert not taylor_sums(weight, torch.ones(2, 3), 0).requires_grad
    assert taylor_sums_batch([], [], []) == []


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
    with pytest.raises(ValueError, match="2 weights, 1 gradients"):
        taylor_sums_batch([weight, weight], [weight], [0])
    with pytest.raises(ValueError, match="is on meta, weight on cpu"):
        taylor_sums(weight, weight.to("meta"), 0)
