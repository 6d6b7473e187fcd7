"""Plans with compensated rounds by two and four processes are the plan of one, and so is every compensation."""

from pathlib import Path

import pytest
import torch
from pairs import assert_done, run_together
from safetensors.torch import load_file
from shared_rounds import FEW, compensate_all, planned, save, statistics_of, stirred
from tiny_models import tiny_model

from slimvlm.compress.allocate.order import Order

WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from shared_rounds import FEW, compensate_all, planned, statistics_of, streamed
from slimvlm.compress import processes
from tiny_models import tiny_model

folder = Path(sys.argv[1])
torch.set_num_threads(1)
with processes.joined():
    for name in FEW:
        save_file(compensate_all(tiny_model(name)), folder / f"{name}.{processes.rank()}")
        planned(tiny_model(name)).order.save(folder / f"{name}.{processes.rank()}.order")
    by_block = streamed(folder, FEW[0])
    save_file({**statistics_of(by_block), **compensate_all(by_block)}, folder / f"streamed.{processes.rank()}")
"""


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """What so many processes found."""
    folder = tmp_path_factory.mktemp("found")
    (folder / "worker.py").write_text(WORKER)
    save(folder, FEW[0])
    assert_done(run_together(folder, request.param, [folder / "worker.py", folder]))
    return folder, request.param


def assert_all_as(alone: dict[str, torch.Tensor], folder: Path, name: str, count: int) -> None:
    together = [load_file(folder / f"{name}.{rank}") for rank in range(count)]
    assert all(one.keys() == alone.keys() for one in together)
    for key, value in alone.items():
        torch.testing.assert_close(together[0][key], value, rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-6)
        assert all(one[key].equal(together[0][key]) for one in together), (name, key)


def test_a_compensation_that_processes_share_is_that_of_one(found: tuple[Path, int]) -> None:
    for name in FEW:
        assert_all_as(compensate_all(tiny_model(name)), found[0], name, found[1])


def test_what_processes_see_block_by_block_is_what_one_sees_of_the_whole_model(found: tuple[Path, int]) -> None:
    whole = tiny_model(FEW[0], "sdpa")
    assert_all_as({**statistics_of(whole), **compensate_all(whole)}, found[0], "streamed", found[1])


@pytest.mark.parametrize("name", FEW)
def test_compensated_rounds_that_processes_share_give_the_plan_of_one(name: str, found: tuple[Path, int]) -> None:
    folder, count = found
    alone = planned(tiny_model(name)).order
    for steps in alone.rounds:  # no unit is so near to the threshold that rounding could decide on it
        assert planned(stirred(tiny_model(name))).order.plan_after(steps).keep == alone.plan_after(steps).keep
    for rank in range(count):
        together = Order.read(folder / f"{name}.{rank}.order")
        assert together.rounds == alone.rounds
        assert all(together.plan_after(steps).keep == alone.plan_after(steps).keep for steps in alone.rounds)
