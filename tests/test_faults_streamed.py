"""What goes wrong with the files of a model that is read block by block: one sentence, exit code 3, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny_folders import write_tiny
from tiny_models import tiny_model
from tiny_processors import tiny_processor

from slimvlm.cli import main
from slimvlm.compress.errors import CheckpointError
from slimvlm.compress.files.writing import file_digest
from slimvlm.compress.models import computing
from slimvlm.compress.models.saving import save_checkpoint
from slimvlm.compress.options import CompressOptions, SparsifyOptions
from slimvlm.compress.stages.sparsify import sparsify_model
from slimvlm.pipeline import apply_saved_plan, make_plan

APPLIED = {"samples": 4, "eval_samples": 2, "batch_size": 2, "stream": "on"}
SHORT = {**APPLIED, "rounds": 1, "ratio": 0.2}


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sharded`, a model in several files without a manifest, `samples.jsonl`, and `run`, in which it was cut."""
    folder = tmp_path_factory.mktemp("given")
    write_tiny(folder, samples=8)
    save_checkpoint(folder / "sharded", tiny_model("llava").model, tiny_processor("llava"), None, max_shard_size="60KB")
    (folder / "sharded" / "manifest.json").unlink()
    words = ["--samples", 4, "--eval-samples", 2, "--ratio", 0.2, "--rounds", 1, "--criterion", "magnitude"]
    words += ["--recover", "none", "--export", "none", "--no-profile", "--quiet", "--data", folder / "samples.jsonl"]
    made = invoke("compress", folder / "sharded", folder / "run", *words)
    assert made.exit_code == 0, made.stderr
    return folder


@pytest.fixture
def model(given: Path, tmp_path: Path) -> Path:
    """A copy of the model to be damaged."""
    return Path(shutil.copytree(given / "sharded", tmp_path / "model"))


def weight_of_block(names: Iterable[str]) -> str:
    return next(name for name in names if "language_model" in name and name.endswith(".1.mlp.down_proj.weight"))


def shard_of_block(model: Path) -> Path:
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    return model / index[weight_of_block(index)]


def truncate(model: Path) -> str:
    shard = shard_of_block(model)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    return shard.name


def remove(model: Path) -> str:
    shard_of_block(model).unlink()
    return shard_of_block(model).name


def rewritten(change: Callable[[torch.Tensor], torch.Tensor | None], says: str) -> Callable[[Path], str]:
    """With another tensor in the place of one, or none, which the index still names."""

    def damage(model: Path) -> str:
        shard = shard_of_block(model)
        tensors = load_file(shard)
        name = weight_of_block(tensors)
        other = change(tensors.pop(name))
        save_file(tensors | ({} if other is None else {name: other}), shard, {"format": "pt"})
        return says

    return damage


def garble(model: Path) -> str:
    (model / "model.safetensors.index.json").write_text('{"weight_map": ')
    return "model.safetensors.index.json"


DAMAGES = {
    "a truncated shard": truncate,
    "a missing shard": remove,
    "a tensor that a shard lacks": rewritten(lambda _: None, "1 missing weights (model.language_model.layers.1."),
    "a tensor of integers": rewritten(lambda weight: weight.to(torch.int8), "1 weights are I8"),
    "a tensor of another size": rewritten(lambda weight: weight[1:].clone(), "1 mismatched weights"),
    "a garbled index": garble,
}
COMMANDS = {
    "plan": ("OUT", "--data", "DATA", "--samples", 4),
    "apply": ("RUN/plan.json", "OUT"),
    "compress": ("OUT", "--data", "DATA", "--samples", 4, "--recover", "none", "--export", "none", "--no-profile"),
    "sparsify": ("OUT", "--data", "DATA", "--samples", 4),
    "quantize": ("OUT",),
    "export": ("OUT", "--format", "onnx"),
}
EVALUATE = {"evaluate": ("--data", "DATA")}  # writes nothing


def command_on(name: str, model: Path, given: Path, out: Path) -> Result:
    places = {"OUT": out, "DATA": given / "samples.jsonl", "RUN/plan.json": given / "run" / "plan.json"}
    words = [places.get(str(word), word) for word in (COMMANDS | EVALUATE)[name]]
    return invoke(name, model, *words, "--stream", "on")


def finished(run: Path) -> dict[str, object]:
    """The stages that are, with all that is recorded of them."""
    stages = json.loads((run / "run.json").read_text())["stages"]
    return {name: stage for name, stage in stages.items() if stage["status"] == "finished"}


def weights_of(model: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in model.glob("*.safetensors")}


def assert_refused(said: Result, *words: str) -> None:
    assert said.exit_code == 3, (said.output, said.exception)
    assert [line.startswith("Error: ") for line in said.stderr.splitlines()] == [True], said.stderr
    for word in words:
        assert word in said.stderr


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(given: Path, model: Path, tmp_path: Path, name: str, damage: str) -> None:
    says = DAMAGES[damage](model)
    assert_refused(command_on(name, model, given, tmp_path / "out"), says)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix == ".safetensors"]


@pytest.mark.parametrize("name", ["plan", "apply", "evaluate", "sparsify", "quantize", "export"])
def test_memory_for_less_than_two_blocks_is_refused(
    given: Path, model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.stat").write_text("anon 0\n")
    (tmp_path / "memory.max").write_text("50000")
    monkeypatch.setattr(computing, "CONTAINER", str(tmp_path))
    assert_refused(command_on(name, model, given, tmp_path / "out"), "two blocks of ", "do not fit into 5e-05 GB")


def test_a_recovery_from_a_dense_model_that_is_damaged_is_refused_and_the_run_stays(given: Path) -> None:
    shard = shard_of_block(given / "sharded")
    whole, before = shard.read_bytes(), (finished(given / "run"), weights_of(given / "run" / "model"))
    truncate(given / "sharded")
    try:
        few = ("--steps", 2, "--train-batch-size", 2)
        said = invoke("recover", given / "run", "--recover", "blockwise", *few, "--stream", "on", "--quiet")
    finally:
        shard.write_bytes(whole)
    assert_refused(said, shard.name)
    assert (finished(given / "run"), weights_of(given / "run" / "model")) == before


@pytest.mark.parametrize("name", ["plan", "apply", "sparsify"])
def test_a_shard_that_changes_between_two_readings_is_refused(
    given: Path, model: Path, tmp_path: Path, name: str
) -> None:
    def touch(*_: object) -> None:
        os.utime(shard_of_block(model), (1, 1))

    data = given / "samples.jsonl"
    jobs: dict[str, Callable[[], object]] = {
        "plan": lambda: make_plan(CompressOptions(model=str(model), data=data, out=tmp_path / "out", **SHORT), touch),
        "sparsify": lambda: sparsify_model(
            SparsifyOptions(model=str(model), data=data, out=tmp_path / "out", samples=4, stream="on"), touch
        ),
        "apply": lambda: apply_saved_plan(
            str(model), given / "run" / "plan.json", tmp_path / "out", progress=touch, data=data, **APPLIED
        ),
    }
    with pytest.raises(CheckpointError, match="was changed or replaced while it was read; start again") as said:
        jobs[name]()
    assert "\n" not in str(said.value)
