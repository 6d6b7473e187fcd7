"""Two-sided gather: every path against plain indexing, bit for bit."""

import pytest
import torch

from slimvlm.kernels import Blocks, gather_2d, gather_blocks
from slimvlm.kernels.gather import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64]
SHAPES = [(1, 1), (33, 50), (20, 520)]


def choose(size: int, count: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))[:count].to(dtype)


def make(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def choices(shape: tuple[int, int], dtype: torch.dtype) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    rows, cols = (choose(size, (size + 1) // 2, dtype) for size in shape)
    return [(rows, cols), (rows, None), (None, cols), (None, None), (rows[:0], cols)]


@pytest.mark.parametrize(
    ("dtype", "index_dtype"), [(DTYPES[0], torch.int32), *((dtype, torch.int64) for dtype in DTYPES)], ids=str
)
def test_gather_equals_indexing_rows_and_columns(path, dtype, index_dtype):
    for shape in SHAPES:
        dense = make(shape, dtype)
        for weight in (dense, dense.t().contiguous().t(), torch.cat([dense, dense], 1)[:, : shape[1]]):
            for rows, cols in choices(shape, index_dtype)[: 5 if weight is dense else 2]:
                expected = weight if rows is None else weight[rows.long()]
                expected = expected if cols is None else expected[:, cols.long()]
                out = torch.empty(expected.shape, dtype=dtype, device=path.device)
                path.module("gather").gather_2d(path.put(weight), path.put(rows), path.put(cols), out)
                assert torch.equal(bits(out.cpu()), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_four_blocks_equal_four_gathers(path, dtype):
    for shape in SHAPES:
        dense = make(shape, dtype)
        for weight in (dense, dense.t().contiguous().t()):
            for rows, cols in choices(shape, torch.int64):
                sides = [size if index is None else len(index) for size, index in zip(shape, (rows, cols), strict=True)]
                height, width = ((kept, size - kept) for kept, size in zip(sides, shape, strict=True))
                expected = Blocks(*(torch.empty(h, w, dtype=dtype) for h in height for w in width))
                reference.gather_blocks(weight, rows, cols, expected)
                found = Blocks(*(torch.empty_like(block, device=path.device) for block in expected))
                path.module("gather").gather_blocks(path.put(weight), path.put(rows), path.put(cols), found)
                for one, other in zip(found, expected, strict=True):
                    assert torch.equal(bits(one.cpu()), bits(other))


def test_the_bits_of_nan_arrive(path):
    weight = torch.tensor([[0x7FC00001, 0x7FA00002, 1, 0xFFFFFFFF - 2**32]], dtype=torch.int32).view(torch.float32)
    out = torch.empty(1, 4, device=path.device)
    path.module("gather").gather_2d(path.put(weight), None, path.put(torch.tensor([3, 2, 1, 0])), out)
    assert out.cpu().view(torch.int32).tolist() == [weight.view(torch.int32)[0].flip(0).tolist()]


def test_the_comparison_notices_one_value_in_the_wrong_place(path):
    weight = torch.arange(12.0).reshape(3, 4)
    out = torch.empty(3, 4, device=path.device)
    path.module("gather").gather_2d(path.put(weight), None, path.put(torch.tensor([0, 2, 1, 3])), out)
    assert not torch.equal(bits(out.cpu()), bits(weight))


def test_the_four_blocks_of_a_small_cut_by_hand():
    weight = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    blocks = gather_blocks(weight, torch.tensor([2, 0]), torch.tensor([1]))
    assert blocks.kept.tolist() == [[8], [2]]
    assert blocks.pruned_cols.tolist() == [[7, 9], [1, 3]]
    assert blocks.pruned_rows.tolist() == [[5]]
    assert blocks.pruned.tolist() == [[4, 6]]
    assert [tuple(block.shape) for block in gather_blocks(weight, None, None)] == [(3, 3), (3, 0), (0, 3), (0, 0)]


def test_strides_and_empty_selections():
    weight = torch.arange(12.0).reshape(3, 4)
    rows, none = torch.tensor([2, 0]), torch.tensor([], dtype=torch.int64)
    assert gather_2d(weight.t(), None, rows).tolist() == weight.t()[:, rows].tolist()
    assert gather_2d(weight, none, None).shape == (0, 4)
    assert gather_2d(weight, None, none).shape == (3, 0)


def test_the_result_shares_no_memory_and_no_graph_with_the_weight():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    copy = gather_2d(weight, None, None)
    copy.zero_()
    assert not copy.requires_grad and weight.sum() == 9
    assert not any(block.requires_grad for block in gather_blocks(weight, torch.tensor([0]), None))


def test_out_is_written_and_returned():
    weight, rows = torch.arange(12.0).reshape(3, 4), torch.tensor([2, 0])
    out = torch.empty(2, 4)
    assert gather_2d(weight, rows, None, out=out) is out
    assert out.tolist() == weight[rows].tolist()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(3, 4), r"out \(3, 4\) must be contiguous and of shape \(2, 4\) for weight \(3, 4\)"),
        (torch.empty(4, 2).t(), "must be contiguous"),
        (torch.empty(2, 4, dtype=torch.float16), "out is torch.float16 on cpu, weight is torch.float32 on cpu"),
        (torch.empty(2, 4, device="meta"), "on meta"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(out, message):
    with pytest.raises(ValueError, match=message):
        gather_2d(torch.ones(3, 4), torch.tensor([2, 0]), None, out=out)


def test_an_out_inside_the_weight_is_refused():
    weight = torch.ones(3, 4)
    with pytest.raises(ValueError, match="shares memory"):
        gather_2d(weight, torch.tensor([2, 0]), None, out=weight[:2])


@pytest.mark.parametrize("function", [gather_2d, gather_blocks])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 3]), r"0\.\.2, got 0\.\.3"),
        (torch.tensor([-1]), r"got -1\.\.-1"),
        (torch.tensor([-(2**40), 2**40]), r"got -1099511627776\.\.1099511627776"),
        (torch.tensor([1, 1]), "twice"),
        (torch.tensor([0, 1, 2, 0], dtype=torch.int32), "twice"),
        (torch.tensor([0.0]), "int32 or int64"),
        (torch.arange(4)[::2], "contiguous vector"),
        (torch.tensor([[0]]), "contiguous vector"),
        (torch.tensor([0], device="meta"), "is on meta, weight on cpu"),
    ],
)
def test_bad_indices_are_refused_with_both_shapes(function, rows, message):
    with pytest.raises(ValueError, match=message) as error:
        function(torch.ones(3, 2), rows, None)
    assert "(3, 2)" in str(error.value)
