"""What a name stands for: a run with its export beside the model, a checkpoint, or graphs alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from profiling import save_pair

from slimvlm.compress.errors import CheckpointError, UnsuitableOptionError
from slimvlm.export import ExportOptions, export_checkpoint
from slimvlm.export.running.manifest import MANIFEST
from slimvlm.serve.options import ProfileOptions
from slimvlm.serve.targets import find_target, has_graphs, split_name, what_runs, with_graphs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `slimvlm compress` leaves, as far as it matters here."""
    folder = tmp_path_factory.mktemp("run")
    _, slim = save_pair(folder)
    Path(slim).rename(folder / "model")
    (folder / "run.json").write_text("{}")
    export_checkpoint(
        folder / "model", folder / "export", ExportOptions(formats=("torchscript",), samples=1, max_new_tokens=1)
    )
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.parametrize("name", ("", "model", "export"))
def test_run_model_and_export_are_the_same_model_with_its_graphs(copied, name):
    target = find_target(str(copied / name))
    assert (target.family, target.export) == ("llava", copied / "export")
    assert target.folder("torchscript") == copied / "export"
    if name != "export":
        assert target.folder("torch") == copied / "model"
        assert target.subject("fp32").layout == "per-layer"
        assert target.subject("fp32").kv_bytes_per_token == 2 * target.subject("fp16").kv_bytes_per_token > 0
    assert has_graphs(target, "torchscript")
    assert not has_graphs(target, "onnx")


def test_the_manifest_of_an_export_names_no_folder_of_the_machine(copied, run):
    text = (run / "export" / MANIFEST).read_text()
    assert json.loads(text)["model"]["source"] == "model" and str(run) not in text and str(run.parent) not in text


def test_an_export_of_other_weights_is_not_taken_for_the_models(copied):
    manifest = json.loads((copied / "export" / MANIFEST).read_text())
    manifest["model"]["digest"] = "another"
    (copied / "export" / MANIFEST).write_text(json.dumps(manifest))
    assert find_target(str(copied)).export is None


def test_graphs_whose_checkpoint_is_gone_are_measured_without_shapes(copied):
    manifest = json.loads((copied / "export" / MANIFEST).read_text())
    manifest["model"]["source"] = "moved"
    (copied / "export" / MANIFEST).write_text(json.dumps(manifest))
    target = find_target(str(copied / "export"))
    assert (target.checkpoint, target.shapes) == (None, None)
    subject = target.subject("fp32")
    assert (subject.parameters, subject.kv_bytes_per_token) == (None, None)
    assert subject.weight_bytes == sum(path.stat().st_size for path in (copied / "export" / "torchscript").iterdir())
    with pytest.raises(UnsuitableOptionError, match="leave torch out of --backend"):
        target.folder("torch")
    with pytest.raises(CheckpointError, match="no onnx graphs"):
        with_graphs(target, ("onnx",), copied)


def test_a_run_folder_keeps_its_profile(copied):
    assert ProfileOptions(slim=str(copied)).written == copied / "profile.json"
    assert ProfileOptions(slim=str(copied / "model")).written == Path("profile.json")
    assert ProfileOptions(slim=str(copied), out=Path("other.json")).written == Path("other.json")


@pytest.mark.parametrize(
    ("name", "folder", "words"),
    (
        ("here", "here", ""),
        ("here:onnx:int8", "here", "onnx:int8"),
        ("here:int8", "here", "int8"),
        ("here:int5", "here", "int5"),  # refused later, by what is there
        ("with:colon", "with:colon", ""),
        ("with:colon:onnx", "with:colon", "onnx"),
        ("of/hub:onnx:int8", "of/hub", "onnx:int8"),
        ("of/hub:int5", "of/hub:int5", ""),  # refused as no name of a folder or of the hub
        (":onnx", ":onnx", ""),
    ),
)
def test_a_name_is_a_folder_and_the_backend_behind_it(tmp_path, monkeypatch, name, folder, words):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("with:colon").mkdir()
    assert split_name(name) == (folder, words)


def test_run_checkpoint_and_export_are_run_by_the_graphs_that_are_named(copied):
    export = str(copied / "export")
    assert what_runs(f"{copied}:torchscript") == what_runs(f"{copied / 'model'}:fp32") == (export, "torchscript")
    assert what_runs(export) == what_runs(f"{export}:torchscript:fp32") == (export, "torchscript")
    assert what_runs(f"{export}:onnx", "torchscript") == (export, "torchscript")  # --backend is said last
    assert what_runs(f"{copied}:torch") == (str(copied / "model"), "torch")
    assert what_runs(str(copied / "model")) == (str(copied / "model"), "torch")
    for name in (f"{copied}:int8", f"{export}:onnx", f"{export}:int5"):
        with pytest.raises(UnsuitableOptionError, match=r"has no .* graphs; it holds torchscript"):
            what_runs(name)
    shutil.rmtree(export)
    with pytest.raises(UnsuitableOptionError, match="is a checkpoint, which runs on torch only; export it for int8"):
        what_runs(f"{copied / 'model'}:int8")


def test_a_named_backend_has_a_size_of_its_own_and_graphs_that_are_made_where_there_are_none(copied):
    target = find_target(f"{copied}:int8")
    assert (target.given, target.backend, target.checkpoint) == (f"{copied}:int8", "onnx:int8", copied / "model")
    small = find_target(f"{copied}:torchscript").subject("fp32").weight_bytes
    assert small == sum(path.stat().st_size for path in (copied / "export" / "torchscript").iterdir())
    assert find_target(str(copied)).subject("fp32").weight_bytes != small
    with pytest.raises(UnsuitableOptionError, match="int5 is unknown"):
        find_target(f"{copied}:int5")
