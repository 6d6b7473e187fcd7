"""The whole job by two processes, with copies of the models and with shards of them."""

import json
from pathlib import Path

import pytest
from pairs import assert_done, run_pair
from safetensors.torch import load_file
from short_recoveries import options_in

from slimvlm.compress.options import CompressOptions
from slimvlm.pipeline import compress

JOB = """
import json, os, sys
from pathlib import Path
from slimvlm.compress.options import CompressOptions
from slimvlm.pipeline import compress

written = (Path(sys.argv[0]).parent / f"written.{os.environ['RANK']}").open("w")

def note(event, args):
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike) and args[2] & (os.O_WRONLY | os.O_RDWR):
        print(os.path.abspath(os.fsdecode(args[0])), file=written, flush=True)

sys.addaudithook(note)
options = json.loads(sys.argv[1])
paths = {name: Path(options[name]) for name in ("out", "data", "eval_data")}
compress(CompressOptions(**{**options, **paths, "export": ()}))
"""
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


CHANGES = {"recover": "sft", "dropout": 0.0, "precision": "no", "steps": 4, "validate_every": 4, "warmup": 1}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> CompressOptions:
    options = options_in(tmp_path_factory.mktemp("alone"), **CHANGES)
    compress(options)
    return options


@pytest.mark.parametrize("sharding", [{}, SHARDED], ids=["copies", "shards"])
def test_two_processes_recover_the_model_that_one_recovers(alone, tmp_path: Path, sharding: dict[str, str]) -> None:
    two = {name: value for name, value in vars(alone).items() if isinstance(value, str | int | float | Path)}
    two = {name: str(value) if isinstance(value, Path) else value for name, value in two.items()}
    (tmp_path / "job.py").write_text(JOB)
    words = [tmp_path / "job.py", json.dumps({**two, "out": str(tmp_path / "two")})]
    assert_done(run_pair(tmp_path, words, **sharding))
    first, second = ({*(tmp_path / f"written.{rank}").read_text().splitlines()} for rank in (0, 1))
    inside = [{path for path in paths if path.startswith(str(tmp_path / "two"))} for paths in (first, second)]
    assert all(inside) and not inside[0] & inside[1]  # each writes files of its own
    folders = (alone.out / "model", tmp_path / "two" / "model", alone.out / "cut")
    one, together, cut = (load_file(folder / "model.safetensors") for folder in folders)
    for name, value in one.items():
        moved = (value.float() - cut[name].float()).norm()
        assert (value.float() - together[name].float()).norm() <= 0.05 * moved + 1e-6, name
