"""Calibration by two processes: every statistic and every criterion's plan is that of one, and so is a message."""

from pathlib import Path

import pytest
import torch
from pairs import assert_done, run_pair
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_model

from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.allocate.order import Order
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_units
from slimvlm.compress.rounds import Planning, plan_in_rounds
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions

COUNTS = ("samples", "text_tokens", "selected_tokens")
WORKER = f"""
import os, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import distributed
from slimvlm.compress.allocate.budget import Budget
from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.rounds import Planning, plan_in_rounds
from slimvlm.compress.statistics.collect import collect
from slimvlm.compress.statistics.rows import STATISTICS, CalibrationOptions
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_units
from tiny_models import tiny_model

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
tiny = tiny_model("llava")
family = find_family(tiny.model.config)
batches = [tiny.inputs(count) for count in (1, 3, 2)]
for name in STATISTICS:
    groups = find_units(tiny.model, family, STATISTICS[name].units)
    found = collect(tiny.model, family, groups, batches, CalibrationOptions((name,)))
    save_file(dict(found.seen[name]), folder / f"{{name}}.{{rank}}", {{c: str(getattr(found, c)) for c in {COUNTS}}})
for name, criterion in CRITERIA.items():
    planned = plan_in_rounds(tiny_model("llava").model, lambda _: batches, Planning(Budget(0.3), criterion))
    planned.order.save(folder / f"{{name}}.{{rank}}.order")
batches[1]["pixel_values"][:] = float("inf")  # only the second process reads it; both must stop
try:
    collect(tiny.model, family, find_units(tiny.model, family, "width"), batches, CalibrationOptions(("first",)))
except CalibrationError as error:
    (folder / f"error.{{rank}}").write_text(str(error))
distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "worker.py").write_text(WORKER)
    assert_done(run_pair(folder, [folder / "worker.py", folder]))
    return folder


@pytest.mark.parametrize("name", STATISTICS)
def test_two_processes_give_the_statistics_of_one(name: str, folder: Path) -> None:
    tiny = tiny_model("llava")
    family = find_family(tiny.model.config)
    groups = find_units(tiny.model, family, STATISTICS[name].units)
    batches = [tiny.inputs(count) for count in (1, 3, 2)]
    alone = collect(tiny.model, family, groups, batches, CalibrationOptions((name,)))
    first, second = (load_file(folder / f"{name}.{rank}") for rank in (0, 1))
    assert first.keys() == alone.seen[name].keys()
    for key, value in alone.seen[name].items():
        assert torch.equal(first[key], second[key])
        if name.endswith("angles"):  # a cosine on the edge of a bin may fall on either side after fp32 rounding
            assert ((value - first[key]).abs() < 1e-5).float().mean() > 0.95, key
        else:  # a perturbed reading is small differences of losses, which are rounded
            close = 1e-2 if STATISTICS[name].reads == "perturbed" else 1e-4
            torch.testing.assert_close(value, first[key], rtol=close, atol=1e-6 * value.max().item() + 1e-12)
    with safe_open(folder / f"{name}.0", "pt") as file:
        assert file.metadata() == {count: str(getattr(alone, count)) for count in COUNTS}


@pytest.mark.parametrize("name", CRITERIA)
def test_two_processes_give_one_order_with_the_plan_of_one(name: str, folder: Path) -> None:
    batches = [tiny_model("llava").inputs(count) for count in (1, 3, 2)]
    planning = Planning(Budget(0.3), CRITERIA[name])
    alone = plan_in_rounds(tiny_model("llava").model, lambda _: batches, planning).plan
    first, second = (Order.read(folder / f"{name}.{rank}.order") for rank in (0, 1))
    assert first.digest == second.digest
    # Sums are added in another order: of the units at the threshold another one may go, no others.
    pair = first.plan
    other = sum(len(set(alone.keep[key]) ^ set(kept)) for key, kept in pair.keep.items())
    assert other <= 0.01 * sum(pair.sizes.values()) and pair.sizes == alone.sizes


def test_both_processes_stop_with_one_message(folder: Path) -> None:
    assert (folder / "error.0").read_text() == (folder / "error.1").read_text()
    assert "batch 2 of 3" in (folder / "error.0").read_text()
