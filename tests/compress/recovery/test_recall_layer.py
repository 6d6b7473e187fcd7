"""One low-rank linear with weight recalling, against numbers worked out by hand, and its options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimvlm.compress.errors import UnsuitableOptionError
from slimvlm.compress.options import LowRank
from slimvlm.compress.recovery.adapters.recall import RecallConfig, RecallLinear, hold_slices
from slimvlm.compress.recovery.adapters.slices import Recalled
from slimvlm.compress.recovery.adapters.targets import check_ranks


def layer(weight, recalled, factors, alpha=2.0):
    """One adapted linear of rank 1 with the given factors; s = alpha."""
    base = nn.Linear(len(weight[0]), len(weight), bias=False)
    base.weight = nn.Parameter(torch.tensor(weight))
    hold_slices(base, recalled)
    config = RecallConfig(r=1, recall_rank=1, lora_alpha=alpha, lora_dropout=0.0)
    adapted = RecallLinear(base, "default", config=config, r=1, lora_alpha=alpha)
    for name, value in factors.items():
        getattr(adapted, name)["default"].weight.data = torch.tensor(value)
    return adapted


ROWS = (
    [[1.0, 0.0, 2.0], [2.0, 1.0, 0.0]],
    Recalled(rows=torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])),
    {
        "lora_A": [[0.1, 0.0, -0.1]],
        "lora_B": [[0.5], [1.0]],
        "lora_rows_A": [[0.5, -0.5]],
        "lora_rows_B": [[0.1], [-0.1]],
    },
)
COLUMNS = (
    [[1.0, 1.0], [0.0, 2.0]],
    Recalled(columns=torch.tensor([[0.0, 2.0], [1.0, 1.0]])),
    {
        "lora_A": [[0.1, 0.1]],
        "lora_B": [[0.0], [0.5]],
        "lora_columns_A": [[0.5, -0.5]],
        "lora_columns_B": [[0.1], [0.2]],
    },
)


@pytest.mark.parametrize(
    ("case", "x", "y", "merged"),
    [
        (ROWS, [1.0, 2.0, 3.0], [6.7, 3.7], [[1.0, 0.0, 1.9], [2.3, 1.0, -0.2]]),
        (COLUMNS, [1.0, 2.0], [2.6, 4.0], [[1.4, 0.6], [0.4, 1.8]]),
    ],
    ids=["rows", "columns"],
)
def test_forward_and_merge_give_the_golden_numbers(case, x, y, merged):
    adapted = layer(*case)
    torch.testing.assert_close(adapted(torch.tensor(x)), torch.tensor(y), atol=1e-6, rtol=0)
    base = adapted.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    torch.testing.assert_close(base.weight.data, torch.tensor(merged), atol=1e-6, rtol=0)
    torch.testing.assert_close(base(torch.tensor(x)), torch.tensor(y), atol=1e-6, rtol=0)


def test_a_matrix_cut_on_both_sides_recalls_both():
    torch.manual_seed(0)
    dense, rows, columns = torch.randn(6, 5), torch.tensor([0, 2, 5]), torch.tensor([1, 4])
    lost_rows, lost_columns = torch.tensor([1, 3, 4]), torch.tensor([0, 2, 3])
    kept = dense[rows][:, columns]
    recalled = Recalled(dense[lost_rows][:, columns], dense[rows][:, lost_columns])
    shapes = {
        **{"lora_A": (1, 2), "lora_B": (3, 1), "lora_rows_A": (1, 3), "lora_rows_B": (3, 1)},
        **{"lora_columns_A": (1, 2), "lora_columns_B": (3, 1)},
    }
    f = {name: torch.randn(shape) for name, shape in shapes.items()}
    adapted = layer(kept.tolist(), recalled, {name: value.tolist() for name, value in f.items()}, alpha=1.5)
    mixed = f["lora_rows_B"] @ f["lora_rows_A"] @ dense[lost_rows][:, columns]
    spread = dense[rows][:, lost_columns] @ f["lora_columns_B"] @ f["lora_columns_A"]
    expected = kept + 1.5 * (f["lora_B"] @ f["lora_A"] + mixed + spread)
    x = torch.randn(4, 2)
    torch.testing.assert_close(adapted(x), x @ expected.T)
    torch.testing.assert_close(kept + adapted.get_delta_weight("default"), expected)


def test_dropout_is_on_the_plain_branch_only():
    torch.manual_seed(0)
    weight, recalled, factors = ROWS
    adapted = layer(weight, recalled, factors)
    adapted.lora_dropout["default"] = nn.Dropout(0.5)
    x = torch.randn(256, 3)
    expected = adapted.eval()(x)
    assert not torch.equal(adapted.train()(x), expected)
    adapted.lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(adapted.train()(x), adapted.eval()(x))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "ranks must be at least 1, got 0 and 8"),
        ({"recall_rank": -1}, "ranks must be at least 1, got 8 and -1"),
        ({"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_without_a_meaning_are_refused(values, message):
    with pytest.raises(UnsuitableOptionError, match=message):
        check_ranks(nn.Linear(9, 9), (), LowRank(**values))


def test_the_defaults_are_the_papers():
    assert LowRank() == LowRank(rank=8, recall_rank=8, alpha=16.0, dropout=0.05, recall=True)
