"""Two-sided gather: the CPU path against plain indexing, bit for bit."""

import pytest
import torch

from slimvlm.kernels import gather_2d
from slimvlm.kernels.gather import cpu, reference


def choose(size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))[:count].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1), (63, 1000), (700, 1030)], ids=str)
def test_gather_equals_indexing_rows_and_columns(shape, index_dtype, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    rows, cols = (choose(size, (size + 1) // 2, index_dtype) for size in shape)
    for chosen in ((rows, cols), (rows, None), (None, cols), (None, None)):
        expected = weight
        if chosen[0] is not None:
            expected = expected[chosen[0].long()]
        if chosen[1] is not None:
            expected = expected[:, chosen[1].long()]
        for path in (cpu, reference):
            found = path.gather_2d(weight, *chosen)
            assert found.is_contiguous() and found.dtype == dtype and torch.equal(found, expected)


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


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 3]), r"0\.\.2, got 0\.\.3"),
        (torch.tensor([-1]), r"got -1\.\.-1"),
        (torch.tensor([1, 1]), "twice"),
        (torch.tensor([0.0]), "int32 or int64"),
        (torch.arange(4)[::2], "contiguous vector"),
        (torch.tensor([[0]]), "contiguous vector"),
    ],
)
def test_bad_indices_are_refused_with_both_shapes(rows, message):
    with pytest.raises(ValueError, match=message) as error:
        gather_2d(torch.ones(3, 2), rows, None)
    assert "(3, 2)" in str(error.value)
