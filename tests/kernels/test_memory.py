"""The CPU paths make nothing of their operands' size: whatever the shape, intermediates stay small."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimvlm.kernels import angle_histogram, gather_2d, gather_blocks, taylor_sums


class Largest(TorchDispatchMode):
    """The largest storage that an operation made, in MB."""

    def __init__(self) -> None:
        super().__init__()
        self.megabytes = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.megabytes = max(self.megabytes, leaf.untyped_storage().nbytes() / 2**20)
        return result


def test_the_measure_sees_an_intermediate_of_full_size():
    weight = torch.ones(2048, 2048)
    with Largest() as largest:
        (weight * weight).sum()
    assert largest.megabytes == 16


def test_sums_of_a_large_matrix_take_blocks_of_two_megabytes():
    weight, grad = torch.ones(2048, 4096), torch.ones(2048, 4096)
    for dim in (0, 1):
        with Largest() as largest:
            assert taylor_sums(weight, grad, dim).eq(weight.shape[1 - dim]).all()
        assert largest.megabytes <= 2


def test_a_histogram_of_many_tokens_takes_blocks_of_one_megabyte():
    tokens = 100_000
    outputs, counts = torch.zeros(tokens, 40), torch.zeros(40, 100, dtype=torch.int64)
    for mask in (None, torch.ones(tokens, dtype=torch.bool)):
        with Largest() as largest:
            angle_histogram(outputs, torch.ones(tokens), torch.ones(40), None, counts, mask=mask)
        assert largest.megabytes <= 1
    assert counts[:, 50].tolist() == [2 * tokens] * 40


def test_a_gather_takes_its_result_and_blocks_of_two_megabytes():
    weight = torch.ones(8192, 2048)
    rows, cols = torch.arange(0, 8192, 8), torch.arange(0, 2048, 2)
    with Largest() as largest:
        assert gather_2d(weight, rows, cols).shape == (1024, 1024)
    assert largest.megabytes <= 4
    with Largest() as largest:
        gather_blocks(weight, rows, cols)
    assert largest.megabytes <= 28  # a block of 7/8 of the rows at half width
