"""Of the benchmark of scale: what it makes is a checkpoint, and the model of the cost agrees with what it measured."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_model
from tiny_processors import tiny_processor

from slimvlm.compress.data.splits import read_evaluation
from slimvlm.compress.models.checkpoint import load_model
from slimvlm.compress.options import EvaluateOptions

ROOT = Path(__file__).parents[1]
RUNS = [json.loads(line) for line in (ROOT / "benchmarks/results/scale.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def scaling():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        from real_shapes import fitting, making, shapes
    return SimpleNamespace(fitting=fitting, making=making, shapes=shapes)


def test_a_checkpoint_is_written_shard_by_shard_and_can_be_loaded_and_asked(scaling, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling.making, "SHARD", 2**13)
    dense = tiny_model("llava").model
    row = scaling.shapes.Shape(lambda: dense.config, lambda: tiny_processor("llava"), 16, "tiny")
    scaling.making.make(row, tmp_path / "made")
    files = sorted((tmp_path / "made" / "model").glob("*.safetensors"))
    names = []
    for file in files:
        with safe_open(file, "pt") as shard:
            names += shard.keys()
    assert len(files) > 3 and sorted(names) == sorted(name for name, _ in dense.named_parameters())
    loaded = load_model(tmp_path / "made" / "model")
    assert loaded.model.dtype == torch.bfloat16 and loaded.processor is not None
    weights = dict(loaded.model.named_parameters())
    assert all(weight.std() > 0 for weight in weights.values() if weight.ndim > 1)
    options = EvaluateOptions(model=str(tmp_path / "made" / "model"), data=tmp_path / "made" / "train.jsonl")
    assert len(read_evaluation(options)) == scaling.making.SAMPLES


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['shape']}, streamed {run['stream']}")
def test_the_model_of_the_cost_is_within_a_fifth_of_what_was_measured(scaling, run):
    points = scaling.fitting.points([run])
    assert points
    wrong = {point.what: point.error for point in points if point.ideal is None and abs(point.error) > 0.2}
    assert wrong == {}  # peaks
    assert all(abs(error) <= 0.2 for error in scaling.fitting.totals(points).values())  # seconds of the job
