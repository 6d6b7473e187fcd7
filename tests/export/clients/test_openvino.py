"""OpenVINO on exported folders: its own reader of ONNX takes every graph in every variant."""

from __future__ import annotations

import subprocess
import sys

import pytest
from client_programs import PYTHON, packages
from exports import answer_of, export_tiny
from tiny_models import FACTORIES

from slimvlm.compress.data.samples import open_image
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.checks.reference import generated_sample
from slimvlm.export.checks.sample import read_sample
from slimvlm.export.checks.verification import check_sample
from slimvlm.export.client.run_onnx import opened
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.runners import fitting
from slimvlm.export.variants import VARIANTS


class Compiled:
    """The graphs of one variant, compiled by OpenVINO as `run_onnx.py` has them compiled."""

    def __init__(self, folder, artifacts):
        self.artifacts = {artifact.graph: artifact for artifact in artifacts}
        self.graphs = {one.graph: opened(folder / one.file, "openvino") for one in artifacts}

    def inputs(self, graph):
        return tuple(self.artifacts[graph].inputs)

    def run(self, graph, feeds):
        names = [port.name for port in self.artifacts[graph].outputs]
        return dict(zip(names, self.graphs[graph](fitting(self.inputs(graph), feeds)), strict=True))


@pytest.fixture(autouse=True)
def openvino(monkeypatch):
    monkeypatch.syspath_prepend(packages("venv"))
    sys.path.append(sys.path.pop(0))  # ours come first


def hold_against_torch(folder):
    """Every variant of an export gives torch's answer to the stored sample, as near as the variant has to."""
    export, (given, expected) = Exported.open(folder), read_sample(folder)
    for name, artifacts in export.graphs.items():
        runner = Compiled(folder, artifacts)
        found = check_sample(runner, export.manifest, artifacts[0].variant, given, expected)
        assert found["ok"], (name, found)
    return set(export.graphs)


@pytest.mark.parametrize("name", FACTORIES)
def test_openvino_gives_the_answer_of_torch_in_every_family(tmp_path, name):
    result = export_tiny(name, tmp_path / "export", variants=("fp32", "int8", "q4"))
    assert hold_against_torch(result.out) == {"onnx", "onnx:int8", "onnx:q4"}


def test_openvino_gives_the_answer_of_torch_in_every_variant_of_the_demo(tmp_path):
    how = {"exporter": "torchscript", "variants": tuple(VARIANTS), "max_new_tokens": 8}
    result = export_checkpoint(MODEL, tmp_path / "export", ExportOptions(data=SAMPLES / "val.jsonl", **how))
    assert len(hold_against_torch(result.out)) == len(VARIANTS)


@pytest.mark.parametrize("name", ("llava", "qwen2_vl", "paligemma", "internvl", "blip2_t5"))
def test_the_example_answers_through_openvino_where_there_is_no_torch(exported, tmp_path, name):
    result, sample = exported(name), generated_sample(4, seed=0)  # the one that is stored
    open_image(sample).save(tmp_path / "image.png")
    asked = [str(tmp_path / "image.png"), sample.turns[0].prompt, "--runtime", "openvino", "--max-new-tokens", "6"]
    command = [str(PYTHON), str(result.out / "run_onnx.py"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == answer_of(result, name)
