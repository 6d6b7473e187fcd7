"""The whole job by two processes, with copies of the models and with shards of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from short_recoveries import options_in

from slimvlm.pipeline import compress

JOB = """
import json, sys
from pathlib import Path
from slimvlm.compress.options import CompressOptions
from slimvlm.pipeline import compress

options = json.loads(sys.argv[1])
paths = {name: Path(options[name]) for name in ("out", "data", "eval_data")}
compress(CompressOptions(**{**options, **paths, "export": ()}))
"""
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@pytest.mark.parametrize("sharding", [{}, SHARDED], ids=["copies", "shards"])
def test_two_processes_recover_the_model_that_one_recovers(tmp_path: Path, sharding: dict[str, str]) -> None:
    changes = {"recover": "sft", "dropout": 0.0, "precision": "no", "steps": 4, "validate_every": 4, "warmup": 1}
    one = options_in(tmp_path, **changes)
    compress(one)
    two = {**{name: value for name, value in vars(one).items() if isinstance(value, str | int | float | Path)}}
    two = {name: str(value) if isinstance(value, Path) else value for name, value in two.items()}
    (tmp_path / "job.py").write_text(JOB)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, **sharding, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    words = [*launcher, tmp_path / "job.py", json.dumps({**two, "out": str(tmp_path / "two")})]
    subprocess.run(words, check=True, cwd=tmp_path, env=environment, timeout=300)
    alone, together = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "two"))
    cut = load_file(tmp_path / "out" / "cut" / "model.safetensors")
    for name, value in alone.items():
        moved = (value.float() - cut[name].float()).norm()
        assert (value.float() - together[name].float()).norm() <= 0.05 * moved + 1e-6, name
