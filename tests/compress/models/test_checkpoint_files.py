"""What an index or a manifest of a checkpoint may name: weight files of its own folder, with size and digest."""

import json

import pytest
import torch
from safetensors.torch import save_file

from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.models.checkpoint import check_weights

INDEX, MANIFEST = "model.safetensors.index.json", "manifest.json"


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors", {"format": "pt"})
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    assert len(check_weights(tmp_path)) == 64
    return tmp_path


@pytest.mark.parametrize("name", ("../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "model.bin"))
def test_an_index_that_leaves_its_folder_is_refused(folder, name):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json names .*, which is no file of its folder"):
        check_weights(folder)


@pytest.mark.parametrize(
    ("name", "document", "message"),
    [
        (INDEX, {}, "key 'weight_map' is missing"),
        (INDEX, [], r"\[\] is not an object"),
        (INDEX, {"weight_map": ["a"]}, r"weight_map: \['a'\] is not an object"),
        (INDEX, {"weight_map": {"a": 1}}, r"weight_map\.a: 1 is not of type str"),
        (INDEX, {"weight_map": {"a": None}}, r"weight_map\.a: None is not of type str"),
        (MANIFEST, {"schema": 1}, "key 'files' is missing"),
        (MANIFEST, {"files": []}, r"files: \[\] is not an object"),
        (MANIFEST, {"files": {"model-00001-of-00001.safetensors": {"bytes": 1}}}, "key 'sha256' is missing"),
        (MANIFEST, {"files": {"a": {"bytes": -(2**70), "sha256": ""}}}, "is too large"),
    ],
)
def test_an_index_or_manifest_that_does_not_fit_is_refused_by_field(folder, name, document, message):
    (folder / name).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=rf"{name} does not fit: .*{message}"):
        check_weights(folder)


def test_an_index_of_nothing_holds_no_weights(folder):
    (folder / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=r"index\.json names no file"):
        check_weights(folder)
