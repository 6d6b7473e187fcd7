"""What really goes wrong on machines: one sentence on stderr, exit code 3, nothing half-written under a final name."""

import gc
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from slimvlm.cli import main
from slimvlm.compress.options import CompressOptions
from slimvlm.compress.streaming import pages
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.pipeline import make_plan


def compress(model: Path, out: Path, *more: str, data: Path = SAMPLES / "train.jsonl") -> Result:
    """The cheapest whole job: no calibration, twelve questions."""
    words = ["compress", model, out, "--data", data, "--criterion", "magnitude", "--rounds", "1", "--samples", "8"]
    words += ["--recover", "none", "--export", "none", "--no-profile"]
    words += ["--eval-samples", "12", "--quiet", *more]
    return CliRunner().invoke(main, [str(word) for word in words])


def assert_refused(result: Result, *says: str) -> None:
    assert result.exit_code == 3, result.output
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    for word in says:
        assert word in result.stderr


def mount(*words: str) -> int:
    """Exit status of mount(8); not 0 where the user may not, or where there is no such command."""
    if shutil.which("mount") is None:
        return 1
    return subprocess.run(["mount", *words], check=False, capture_output=True).returncode


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB: too small for the cut model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)):
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    gc.collect()  # no tensor maps a file of it any more
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def read_only(small_disk: Path) -> Path:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    return small_disk


def test_a_disk_without_room_is_refused_before_anything_is_done(small_disk, model):
    assert_refused(compress(model, small_disk / "out"), "space")
    assert not list(small_disk.rglob("*.json"))


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_what_a_streamed_plan_puts_away_is_not_begun_without_room_for_it(
    small_disk, model, tmp_path, monkeypatch, command
):
    monkeypatch.setattr(pages, "KEPT", 0)
    monkeypatch.setattr(pages, "LEAST", 1)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    asked = [command, model, tmp_path / "out", "--data", SAMPLES / "train.jsonl", "--samples", "64", "--stream", "on"]
    asked += ["--recover", "none", "--export", "none", "--no-profile"] if command == "compress" else []
    assert_refused(CliRunner().invoke(main, [str(word) for word in asked]), "space", "TMPDIR")
    assert not (tmp_path / "out").exists() and not [*small_disk.rglob("*")]


@pytest.mark.parametrize("stream", ["on", "off"])
@pytest.mark.parametrize("words", [("sparsify", "--data", SAMPLES / "train.jsonl"), ("quantize",), ("export",)])
def test_a_result_that_a_disk_has_no_room_for_is_not_begun(small_disk, model, words, stream):
    asked = [words[0], model, small_disk / "out", *words[1:], "--stream", stream]
    assert_refused(CliRunner().invoke(main, [str(word) for word in asked]), "space")
    assert not [path for path in small_disk.rglob("*") if path.is_file()]


def test_after_a_full_disk_the_run_resumes(small_disk, model):
    options = CompressOptions(
        model=str(model), data=SAMPLES / "train.jsonl", out=small_disk / "out", criterion="magnitude", rounds=1,
        samples=8, recover="none", export=(), profile=False, eval_samples=12,
    )  # fmt: skip
    make_plan(options)
    assert_refused(compress(model, small_disk / "out", "--resume"), "space")
    assert (small_disk / "out" / "run.json").is_file()
    assert not (small_disk / "out" / "model").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    resumed = compress(model, small_disk / "out", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert (small_disk / "out" / "model" / "config.json").is_file()


def test_an_unwritable_folder_is_refused(read_only, model):
    assert_refused(compress(model, read_only / "out"), str(read_only))


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert_refused(compress(model, tmp_path / "out", "--overwrite"), "empty")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "vilt", "architectures": ["ViltModel"]}))
    assert_refused(compress(model, tmp_path / "out"), "vilt", "qwen2_5_vl")


@pytest.mark.parametrize("keep", [0, 100, 1_000_000])
def test_a_truncated_weight_file_is_refused(tmp_path, model, keep):
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(keep)
    assert_refused(compress(model, tmp_path / "out"), "model.safetensors")


def test_a_missing_shard_is_refused_by_name(tmp_path, model):
    import slimvlm

    loaded, processor = slimvlm.load(model)
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    processor.save_pretrained(tmp_path / "sharded")
    victim = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1]
    victim.unlink()
    assert_refused(compress(tmp_path / "sharded", tmp_path / "out"), victim.name)


def test_weights_that_are_not_finite_are_refused(tmp_path, model):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "mlp" in name and name.endswith("weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = compress(model, tmp_path / "out", "--criterion", "fisher")
    assert_refused(result, "finite")
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_ratio_no_plan_can_reach_is_refused_with_the_largest(tmp_path, model):
    assert_refused(compress(model, tmp_path / "out", "--ratio", "0.99"), "largest")


def test_a_data_file_without_answers_is_refused(tmp_path, model):
    data = tmp_path / "samples.jsonl"
    data.write_text('{"image": "a.png"}\n')
    assert_refused(compress(model, tmp_path / "out", data=data), "samples.jsonl")


def test_a_device_that_is_not_there_is_refused(tmp_path, model):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert_refused(compress(model, tmp_path / "out", "--device", "cuda"), "cuda", "cpu")


def test_a_crossed_quality_limit_exits_with_4_after_printing_the_result(tmp_path, model):
    result = compress(model, tmp_path / "out", "--max-quality-drop", "0")
    assert result.exit_code == 4
    assert "mean of tasks" in result.stdout
    assert "--max-quality-drop 0" in result.stderr
    assert (tmp_path / "out" / "model" / "config.json").is_file()
