"""The same numbers on a CUDA device as on the CPU; skipped where there is none."""

import pytest
import torch
from plans import make_plan
from streaming import pair
from tiny_models import tiny_model

from slimvlm.compress.criteria.criterion import CRITERIA
from slimvlm.compress.models.computing import load_to_compute
from slimvlm.compress.models.families import find_family
from slimvlm.compress.models.groups import find_groups
from slimvlm.compress.options import ComputeOptions
from slimvlm.compress.slicing.apply import apply_plan
from slimvlm.compress.statistics.collect import collect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """cuDNN's convolutions (the patch embeddings) round to TF32 by default, which no CPU does."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("criterion", ["ukmi", "taylor", "fisher", "gate"])
@pytest.mark.parametrize("host_sums", [False, True])
def test_statistics_on_a_gpu_are_those_of_the_cpu(criterion, host_sums):
    options = CRITERIA[criterion].calibration(host_sums=host_sums)
    seen = {}
    for device in ("cpu", "cuda"):
        tiny = tiny_model("llava")
        model = tiny.model.to(device)
        family = find_family(model.config)
        seen[device] = collect(model, family, find_groups(model, family), [tiny.inputs(2), tiny.inputs(3)], options)
    name = options.statistics[0]
    for key, value in seen["cpu"].seen[name].items():
        scale = value.max().item()
        torch.testing.assert_close(seen["cuda"].seen[name][key], value, rtol=1e-3, atol=1e-4 * scale + 1e-12)


def test_a_cut_on_a_gpu_keeps_the_weights_of_a_cut_on_the_cpu():
    weights = {}
    for device in ("cpu", "cuda"):
        model = tiny_model("llava").model.to(device)
        plan = make_plan(model, lambda group: range(0, group.size, 2))
        weights[device] = apply_plan(model, plan).state_dict()
    assert all(torch.equal(value.cpu(), weights["cpu"][name]) for name, value in weights["cuda"].items())


@pytest.mark.parametrize("criterion", ["taylor", "gate", "wanda-sp"])
def test_statistics_of_a_model_read_block_by_block_onto_a_gpu_are_those_of_the_cpu(tmp_path, criterion):
    tiny, _ = pair(tmp_path, "llava")
    folder, options = str(tmp_path / "dense"), CRITERIA[criterion].calibration()
    streamed = load_to_compute(ComputeOptions(device="cuda", stream="on"), folder, beside=0.0).model
    batches, family = [tiny.inputs(2), tiny.inputs(3)], find_family(streamed.config)
    left, right = (
        collect(model, family, find_groups(model, family), batches, options).seen for model in (tiny.model, streamed)
    )
    for name in options.statistics:
        for key, value in left[name].items():
            scale = value.max().item()
            torch.testing.assert_close(right[name][key], value, rtol=1e-3, atol=1e-4 * scale + 1e-12)
