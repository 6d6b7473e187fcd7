"""Row norms: every path against the reference."""

import pytest
import torch

from slimvlm.kernels import row_norms
from slimvlm.kernels.norms import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (9, 63), (5, 2056), (0, 3), (3, 0)], ids=str)
def test_norms_equal_the_reference(path, shape, dtype):
    matrix = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    expected = reference.row_norms(matrix)
    turned = torch.empty(shape[::-1], dtype=dtype).t().copy_(matrix)
    for one in (matrix, turned):
        found = path.module("norms").row_norms(path.put(one))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu(), expected, rtol=5e-6, atol=0)


def test_large_half_precision_values_do_not_overflow():
    assert row_norms(torch.full((1, 4), 60000.0, dtype=torch.float16)).tolist() == [120000.0]


def test_double_precision_is_read_as_it_is_and_given_in_single():
    assert row_norms(torch.full((1, 4), 1e300, dtype=torch.float64).neg()).tolist() == [torch.inf]
    found = row_norms(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    assert found.dtype == torch.float32 and found.tolist() == [5.0]


def test_misuse_names_dtype_and_shape():
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(3,\)"):
        row_norms(torch.ones(3))
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(1, 1\)"):
        row_norms(torch.ones(1, 1, dtype=torch.int64))
