"""Plans with compensated rounds by two and four processes are the plan of one, and so is every compensation."""

from pathlib import Path

import pytest
import torch
from pairs import assert_done, run_together
from safetensors.torch import load_file
from shared_rounds import FEW, compensate_all, planned, stirred
from tiny_models import tiny_model

from slimvlm.compress.allocate.order import Order

WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from shared_rounds import FEW, compensate_all, planned
from slimvlm.compress import processes
from tiny_models import tiny_model

folder = Path(sys.argv[1])
torch.set_num_threads(1)
with processes.joined():
    for name in FEW:
        save_file(compensate_all(name), folder / f"{name}.{processes.rank()}")
        planned(tiny_model(name)).order.save(folder / f"{name}.{processes.rank()}.order")
"""


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """What so many processes found."""
    folder = tmp_path_factory.mktemp("found")
    (folder / "worker.py").write_text(WORKER)
    assert_done(run_together(folder, request.param, [folder / "worker.py", folder]))
    return folder, request.param


def test_a_compensation_that_processes_share_is_that_of_one(found: tuple[Path, int]) -> None:
    folder, count = found
    for name in FEW:
        alone, *others = compensate_all(name), *(load_file(folder / f"{name}.{rank}") for rank in range(count))
        assert all(other.keys() == alone.keys() for other in others)
        for key, value in alone.items():
            torch.testing.assert_close(others[0][key], value, rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-6)
            assert all(other[key].equal(others[0][key]) for other in others), (name, key)


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
