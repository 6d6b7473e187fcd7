"""`slimvlm sparsify`: the checkpoint, what it says of itself, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from tiny_folders import write_tiny
from transformers import LlavaForConditionalGeneration

from slimvlm import load
from slimvlm.cli import main
from slimvlm.serve.targets import find_target


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("sparsify"))


def run(given, out, *words):
    model, data = given
    return CliRunner().invoke(main, ["sparsify", str(model), str(out), "--data", str(data), "-q", *map(str, words)])


def test_it_writes_a_checkpoint_of_the_unmodified_class_that_says_what_was_done(given, tmp_path):
    out = tmp_path / "sparse"
    said = run(given, out, "--ratio", 0.2, "--samples", 8, "--allocator", "ecoflap-first", "--json")
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["zeros"] == pytest.approx(0.2, abs=1e-3) and found["importance"].keys() == found["groups"].keys()
    recorded = json.loads((out / "config.json").read_text())["slimvlm_sparsity"]
    assert {**recorded, "out": str(out)} == found
    plain = LlavaForConditionalGeneration.from_pretrained(out)
    model, _ = load(out)
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), model.parameters(), strict=True))
    dense = sum(int((weight == 0).sum()) for weight in load(given[0])[0].parameters())
    zeros = sum(int((weight == 0).sum()) for weight in model.parameters()) - dense
    assert zeros == round(found["zeros"] * sum(weight.numel() for weight in model.parameters()))
    assert find_target(str(out)).subject("fp32").zeros == found["zeros"]
    assert find_target(str(given[0])).subject("fp32").zeros == 0
    again = tmp_path / "again"
    run(given, again, "--ratio", 0.2, "--samples", 8, "--allocator", "ecoflap-first")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_read_block_by_block_it_writes_the_same(given, tmp_path):
    for stream in ("off", "on"):
        said = run(given, tmp_path / stream, "--ratio", 0.2, "--samples", 4, "--rule", "sparsegpt", "--stream", stream)
        assert said.exit_code == 0, said.stderr
    off, on = (load(tmp_path / stream)[0] for stream in ("off", "on"))
    for one, two in zip(off.parameters(), on.parameters(), strict=True):
        assert ((one == 0) != (two == 0)).sum() <= 0.01 * one.numel() + 1
    said = run(given, tmp_path / "refused", "--allocator", "ecoflap", "--stream", "on")
    assert said.exit_code == 3 and "--stream off" in said.stderr and said.stderr.count("\n") == 1
    assert not (tmp_path / "refused").exists()


def test_it_tells_a_person_that_nothing_gets_faster(given, tmp_path):
    said = run(given, tmp_path / "sparse", "--sparsity", "2:4", "--samples", 4)
    assert said.exit_code == 0, said.stderr
    assert "(2:4, wanda, local)" in said.stdout and "50.0 %" in said.stdout
    assert "those of the dense model: zeros are stored and multiplied as any other number" in said.stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--sparsity", "2:4", "--ratio", 0.3), "--ratio has no say with --sparsity 2:4"),
        (("--sparsity", "2:4", "--allocator", "ecoflap"), "--allocator has no say with --sparsity 2:4"),
        (("--ratio", 0.99), "ratio 0.99 cannot be reached: the linears of attentions and MLPs hold"),
    ],
)
def test_what_contradicts_itself_or_the_model_is_refused_in_a_sentence(given, tmp_path, words, reason):
    said = run(given, tmp_path / "sparse", *words)
    assert said.exit_code == 3 and reason in said.stderr and said.stderr.count("\n") == 1
    assert not (tmp_path / "sparse").exists()


def test_a_folder_that_holds_something_is_refused_before_anything_is_read(given, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    said = run(given, tmp_path)
    assert said.exit_code == 3 and "is not an empty folder" in said.stderr
