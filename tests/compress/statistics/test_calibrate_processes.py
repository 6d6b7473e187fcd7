"""Calibration by two processes: the statistics of one, and one message when something is wrong."""

from pathlib import Path

import torch
from pairs import run_pair
from tiny_models import tiny_model

from slimvlm.compress.criteria.criterion import CRITERIA, Criterion
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.statistics.calibration import Calibration, CalibrationOptions
from slimvlm.compress.statistics.collect import collect

WORKER = """
import os, sys
from pathlib import Path
import torch
from torch import distributed
from slimvlm.compress.statistics.collect import CalibrationOptions, collect
from slimvlm.compress.criteria import CRITERIA, Criterion
from slimvlm.compress.errors import CalibrationError
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from tiny_models import tiny_model

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
tiny = tiny_model("llava")
family = find_family(tiny.model.config)
groups = find_groups(tiny.model, family)
batches = [tiny.inputs(count) for count in (1, 3, 2)]
for criterion in (CRITERIA["ukmi"], Criterion("mix", "mix", None, False), CRITERIA["fisher"], CRITERIA["gate"]):
    seen = collect(tiny.model, family, groups, batches, CalibrationOptions(criterion=criterion))
    seen.save(folder / f"{criterion.name}.{rank}.safetensors")
batches[1]["pixel_values"][:] = float("inf")  # only the second process reads it; both must stop
try:
    collect(tiny.model, family, groups, batches, CalibrationOptions(criterion=CRITERIA["taylor"]))
except CalibrationError as error:
    (folder / f"error.{rank}").write_text(str(error))
distributed.destroy_process_group()
"""


def test_two_processes_give_the_statistics_of_one(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    run_pair(tmp_path / "worker.py")
    tiny = tiny_model("llava")
    family = find_family(tiny.model.config)
    groups = find_groups(tiny.model, family)
    batches = [tiny.inputs(count) for count in (1, 3, 2)]
    for criterion in (CRITERIA["ukmi"], Criterion("mix", "mix", None, False), CRITERIA["fisher"], CRITERIA["gate"]):
        alone = collect(tiny.model, family, groups, batches, CalibrationOptions(criterion=criterion))
        first, second = (Calibration.load(tmp_path / f"{criterion.name}.{rank}.safetensors") for rank in (0, 1))
        for key, value in alone.saliency.items():
            torch.testing.assert_close(value, first.saliency[key], rtol=1e-4, atol=1e-6 * value.max().item() + 1e-12)
        for key, value in alone.entropy.items():
            # A cosine on the edge of a bin may fall on either side after fp32 rounding.
            assert ((value - first.entropy[key]).abs() < 1e-5).float().mean() > 0.95, key
        assert all(torch.equal(first.saliency[key], second.saliency[key]) for key in first.saliency)
        assert all(torch.equal(first.entropy[key], second.entropy[key]) for key in first.entropy)
        assert (first.num_samples, first.text_tokens, first.selected_tokens, first.micro_batch) == (
            alone.num_samples,
            alone.text_tokens,
            alone.selected_tokens,
            alone.micro_batch,
        )
    assert (tmp_path / "error.0").read_text() == (tmp_path / "error.1").read_text()
    assert "batch 2 of 3" in (tmp_path / "error.0").read_text()
