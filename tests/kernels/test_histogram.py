"""Angle histogram and entropy: the golden example G5, and every path against the reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimvlm.kernels import angle_histogram, histogram_entropy
from slimvlm.kernels.histogram import reference


def counts_of(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **options) -> torch.Tensor:
    counts = torch.zeros(weight.shape[0], 100, dtype=torch.int64)
    outputs = torch.nn.functional.linear(tokens, weight, bias)
    angle_histogram(outputs, tokens.norm(dim=1), weight.norm(dim=1), bias, counts, **options)
    return counts


def bins_of(counts: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in counts]


def test_golden_g5_bins_and_entropy():
    weight = torch.tensor([[1.0, 2, 2], [0, 0, 1]])
    tokens = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [-1, 0, 0], [2, 0, 0]])
    two = counts_of(tokens[:2], weight)
    assert bins_of(two) == [[66, 85], [50]]
    assert histogram_entropy(two).tolist() == pytest.approx([math.log(2), 0], abs=1e-6)
    five = counts_of(tokens, weight)
    assert bins_of(five) == [[33, 66, 85, 97], [50, 85]]
    assert histogram_entropy(five).tolist() == pytest.approx([1.332179, 0.500402], abs=1e-6)


@pytest.mark.parametrize(("cosine", "bin_"), [(-1.0, 0), (0.0, 50), (0.981, 99), (1.0, 99)])
def test_golden_g5_edges(cosine, bin_):
    counts = torch.zeros(1, 100, dtype=torch.int64)
    angle_histogram(torch.tensor([[cosine]]), torch.ones(1), torch.ones(1), None, counts)
    assert bins_of(counts) == [[bin_]]


@pytest.mark.parametrize(("drop_outside", "bins"), [(True, [[]]), (False, [[0, 99]])])
def test_values_pushed_outside_by_rounding_are_dropped_only_when_asked(drop_outside, bins):
    counts = torch.zeros(1, 100, dtype=torch.int64)
    outputs = torch.tensor([[1.0000002], [-1.0000002]])
    angle_histogram(outputs, torch.ones(2), torch.ones(1), None, counts, drop_outside=drop_outside)
    assert bins_of(counts) == bins


def near_an_edge(cosine: torch.Tensor) -> torch.Tensor:
    position = (cosine.double() + 1) * 50
    return (position - position.round()).abs() < 1e-3


def away_from_edges(shape, norms, bias, dtype):
    """Outputs none of whose cosines a rounding moves to another bin, some of them outside of [-1, 1]."""
    cosine = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    outputs = (cosine * norms[0][:, None] * norms[1] + bias).to(dtype)
    exact = (outputs.double() - bias.double()) / norms[0][:, None].double() / norms[1].double()
    return torch.where(near_an_edge(exact), (0.003 * norms[0][:, None] * norms[1] + bias).to(dtype), outputs)


@pytest.mark.parametrize("drop_outside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (530, 17), (7, 40), (0, 3), (5, 0)], ids=str)
def test_counts_equal_the_reference_away_from_edges(path, shape, dtype, drop_outside):
    generator = torch.Generator().manual_seed(0)
    norms = (torch.rand(shape[0], generator=generator) + 0.5, torch.rand(shape[1], generator=generator) + 0.5)
    bias = torch.randn(shape[1], generator=generator).to(dtype) * (dtype == torch.float32)
    outputs = away_from_edges(shape, norms, bias, dtype)
    mask = torch.arange(shape[0]) % 2 == 0
    expected = torch.zeros(shape[1], 100, dtype=torch.int64)
    reference.angle_histogram(outputs, norms, bias, expected, None, drop_outside)
    reference.angle_histogram(outputs, norms, bias, expected, mask, drop_outside)
    turned = outputs.t().contiguous().t()
    for one, count in ((outputs, torch.int64), (turned, torch.int32)):
        found = torch.zeros(shape[1], 100, dtype=count, device=path.device)
        for valid in (None, mask):
            operands = (path.put(one), tuple(map(path.put, norms)), path.put(bias), found, path.put(valid))
            path.module("histogram").angle_histogram(*operands, drop_outside)
        assert torch.equal(found.cpu().long(), expected)
        assert drop_outside or found.sum(1).tolist() == [shape[0] + int(mask.sum())] * shape[1]


@pytest.mark.parametrize("bins", [1, 7, 100, 128, 700])
def test_any_number_of_bins_and_values_outside(path, bins):
    outputs = torch.tensor([[-3.0, 0.1], [-0.35, 0.93], [2.0, 7.0]])
    norms = (torch.ones(3), torch.ones(2))
    for drop_outside in (False, True):
        found, expected = (torch.zeros(2, bins, dtype=torch.int64) for _ in range(2))
        reference.angle_histogram(outputs, norms, None, expected, None, drop_outside)
        moved = path.put(found)
        path.module("histogram").angle_histogram(
            path.put(outputs), tuple(map(path.put, norms)), None, moved, None, drop_outside
        )
        assert torch.equal(moved.cpu(), expected)


def test_counts_that_are_a_view_are_added_to(path):
    table = torch.zeros(4, 100, dtype=torch.int64, device=path.device)
    operands = (torch.zeros(6, 2), (torch.ones(6), torch.ones(2)))
    moved = (path.put(operands[0]), tuple(map(path.put, operands[1])))
    for _ in range(2):
        path.module("histogram").angle_histogram(*moved, None, table[::2], None, False)
    assert bins_of(table.cpu()) == [[50], [], [50], []] and table.sum() == 24


def test_the_comparison_notices_one_token_in_another_bin(path):
    outputs, norms = torch.full((9, 3), 0.305), (torch.ones(9), torch.ones(3))
    found, expected = (torch.zeros(3, 100, dtype=torch.int64) for _ in range(2))
    reference.angle_histogram(outputs, norms, None, expected, None, False)
    outputs[4, 1] = 0.325
    moved = path.put(found)
    path.module("histogram").angle_histogram(path.put(outputs), tuple(map(path.put, norms)), None, moved, None, False)
    assert (moved.cpu() - expected).abs().sum() == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31))
def test_every_valid_token_is_counted_once_per_row_and_calls_accumulate(tokens, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 6, generator=generator)
    weight, bias = torch.randn(rows, 6, generator=generator), torch.randn(rows, generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.7
    counts = counts_of(x, weight, bias, mask=mask)
    assert counts.sum(1).tolist() == [int(mask.sum())] * rows
    assert torch.equal(counts, counts_of(x[mask], weight, bias))
    halves = counts_of(x[: tokens // 2], weight, bias) + counts_of(x[tokens // 2 :], weight, bias)
    assert torch.equal(halves, counts_of(x, weight, bias))


def test_zero_tokens_and_zero_rows_have_cosine_zero():
    counts = counts_of(torch.zeros(3, 4), torch.cat([torch.zeros(1, 4), torch.ones(1, 4)]))
    assert bins_of(counts) == [[50], [50]]


def test_entropy_lies_between_zero_and_log_of_the_bins():
    counts = torch.stack([torch.ones(100), torch.eye(100)[3] * 7, torch.zeros(100)]).long()
    assert histogram_entropy(counts).tolist() == pytest.approx([math.log(100), 0, 0], abs=1e-6)


def test_misuse_names_both_shapes():
    outputs, counts = torch.ones(2, 3), torch.zeros(3, 100, dtype=torch.int64)
    good = (outputs, torch.ones(2), torch.ones(3), None, counts)
    with pytest.raises(ValueError, match=r"input_norms \(3,\) does not fit outputs \(2, 3\)"):
        angle_histogram(outputs, torch.ones(3), *good[2:])
    with pytest.raises(ValueError, match=r"counts must be int64 or int32 .* for outputs \(2, 3\), got torch.float32"):
        angle_histogram(*good[:4], counts.float())
    with pytest.raises(ValueError, match=r"counts \(2,\) does not fit"):
        angle_histogram(*good[:4], counts[:2])
    with pytest.raises(ValueError, match="mask must be bool"):
        angle_histogram(*good, mask=torch.ones(2))
    with pytest.raises(ValueError, match="NaN"):
        angle_histogram(outputs * math.nan, *good[1:])
