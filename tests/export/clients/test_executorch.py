"""ExecuTorch on exported folders: programs by examples/to_executorch.py, run by its own runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from client_programs import CLIENTS
from exports import export_tiny, shallow_model

from slimvlm.demo import MODEL, SAMPLES
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.checks.sample import read_sample
from slimvlm.export.checks.verification import check_sample
from slimvlm.export.running.exported import Exported
from slimvlm.export.running.names import DECODER, VISION
from slimvlm.export.running.runners import fitting

POSITIONS = 16  # of the tiny CLIP's and SigLIP's text
SCRIPT = Path(__file__).parents[3] / "examples" / "to_executorch.py"
PAST = "past_sequence_length"
FAMILIES = (
    "llava", "llava_dinov2", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma",
    "smolvlm", "idefics3", "blip2_opt", "blip2_t5", "internvl",
)  # fmt: skip


class Programs:
    """The programs of a folder; a decoder's cache is inside it, so that no one else has to carry it."""

    def __init__(self, folder, artifacts):
        from executorch.runtime import Runtime

        self.artifacts, self.place = {artifact.graph: artifact for artifact in artifacts}, 0
        files = {one.graph: folder / "executorch" / Path(one.file).with_suffix(".pte").name for one in artifacts}
        self.programs = {name: Runtime.get().load_program(file) for name, file in files.items()}
        self.methods = {name: program.load_method("forward") for name, program in self.programs.items()}

    def inputs(self, graph):
        return tuple(port for port in self.artifacts[graph].inputs if PAST not in port.shape)

    def run(self, graph, feeds):
        ports, feeds = self.inputs(graph), dict(feeds)
        values = []
        if graph == VISION:
            self.place = 0
        if graph == DECODER:
            new = feeds["inputs_embeds"].shape[1]
            values = [feeds.get("attention_mask", np.ones((1, self.place + new), np.int64))[:, : self.place]]
            self.place += new
            ports = [port for port in ports if "total_sequence_length" not in port.shape]
        values += fitting(ports, feeds).values()
        found = self.methods[graph].execute([torch.from_numpy(np.ascontiguousarray(value)) for value in values])
        names = [port.name for port in self.artifacts[graph].outputs]
        return {name: value.numpy().copy() for name, value in zip(names, found, strict=False)}


@pytest.fixture(autouse=True)
def executorch(monkeypatch):
    monkeypatch.syspath_prepend(CLIENTS / "executorch")
    sys.path.append(sys.path.pop(0))  # ours come first


def hold_against_torch(folder, longest=128):
    """What the programs of an export answer to the stored sample."""
    command = [sys.executable, str(SCRIPT), str(folder), "--longest", str(longest)]
    paths = {**os.environ, "PYTHONPATH": str(CLIENTS / "executorch")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=paths)
    assert done.returncode == 0, done.stderr[-2000:]
    export, (given, expected) = Exported.open(folder), read_sample(folder)
    found = check_sample(Programs(folder, export.graphs["pt2"]), export.manifest, "fp32", given, expected)
    assert found["ok"], found
    assert found.get("token_share", 1) >= 0.75


@pytest.mark.parametrize("name", FAMILIES)
def test_executorch_gives_the_answer_of_torch(tmp_path, name):
    hold_against_torch(export_tiny(name, tmp_path / "export", shallow_model, formats=("pt2",)).out)


def test_executorch_gives_the_answer_of_torch_on_the_demo(tmp_path):
    options = ExportOptions(formats=("pt2",), data=SAMPLES / "val.jsonl", max_new_tokens=8)
    hold_against_torch(export_checkpoint(MODEL, tmp_path / "export", options).out)


@pytest.mark.parametrize("name", ("clip", "siglip"))
def test_executorch_gives_the_similarities_of_torch(tmp_path, name):
    hold_against_torch(export_tiny(name, tmp_path / "export", shallow_model, formats=("pt2",)).out, longest=POSITIONS)
