"""The commands and recipes of docs/cluster.md are run as they stand there, by two processes on this machine: `make
clients` installs Ray and the schemas of Kubernetes, and Slurm is run where it is installed.

Changed are the paths, the number of GPUs (none), and the options of the job.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import slurm
import yaml

from slimvlm.compress.options import CompressOptions
from slimvlm.demo import MODEL, SAMPLES
from slimvlm.pipeline import compress

PAGE = Path(__file__).parents[1] / "docs" / "cluster.md"
INSTALLED = {"PYTHONPATH": str(Path(os.environ.get("SLIMVLM_CLIENTS", "")) / "cluster")}
PATIENCE = 300.0  # seconds
SHORT = {
    "samples": 8,
    "eval_samples": 8,
    "rounds": 1,
    "criterion": "fisher",
    "recover": "none",
    "device": "cpu",
}
SHARED = {  # calibrations with a refit between them
    "rounds": 2,
    "steps": 6,
    "train_batch_size": 8,
    "validation_samples": 16,
    "validate_every": 6,
    "warmup": 1,
    "dropout": 0.0,
    "precision": "no",
}
WHOLE, BY_BLOCK = {"recover": "lpd"}, {"recover": "blockwise", "stream": "on"}

pytestmark = pytest.mark.skipif("SLIMVLM_CLIENTS" not in os.environ, reason="make clients installs what runs them")


def recipe(language: str) -> str:
    """The one piece of the page in this language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return found


def here(text: str, out: Path, *changes: tuple[str, str]) -> str:
    """The recipe with what is said of it at the top; every change must find its place."""
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SHORT.items())
    for old, new in (
        ("/shared/model", str(MODEL)),
        ("/shared/out", str(out)),
        ("/shared/train.jsonl", str(SAMPLES / "train.jsonl")),
        ("--resume", f"--resume {options} --export none --no-profile"),
        *changes,
    ):
        assert old in text, old
        text = text.replace(old, new)
    return text


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def commands_found() -> Iterator[None]:
    """`slimvlm` and `torchrun` are those of this Python; processes of one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: that of a socket in it may have 107 letters."""
    with tempfile.TemporaryDirectory(prefix="slimvlm-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The units that one process keeps."""
    out = tmp_path_factory.mktemp("alone") / "out"
    data = SAMPLES / "train.jsonl"
    compress(CompressOptions(model=str(MODEL), out=out, data=data, export=(), profile=False, **SHORT))
    return kept(out)


def kept(out: Path) -> dict:
    assert json.loads((out / "run.json").read_text())["stages"]["evaluate"]["status"] == "finished"
    return json.loads((out / "plan.json").read_text())["keep"]


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What one process makes of a job with everything that processes share in it, by its recipe."""

    @cache
    def run(recipe: str) -> Path:
        out = tmp_path_factory.mktemp(recipe) / "out"
        (asked,) = (SHORT | SHARED | more for more in (WHOLE, BY_BLOCK) if more["recover"] == recipe)
        compress(
            CompressOptions(model=str(MODEL), out=out, data=SAMPLES / "train.jsonl", export=(), profile=False, **asked)
        )
        return out

    return run


def learnt(out: Path) -> list[float]:
    """The losses of the steps; of blocks, what each misses before and after."""
    lines = [json.loads(line) for line in (out / "recovery.jsonl").read_text().splitlines()]
    blocks = json.loads((out / "run.json").read_text())["stages"]["recover"].get("blocks", ())
    return [line["loss"] for line in lines if "loss" in line] + [
        one[at] for one in blocks for at in ("before", "after")
    ]


@pytest.mark.parametrize(
    ("launcher", "change", "more"),
    [
        ("torchrun", ("=2", "=2"), BY_BLOCK),
        ("torchrun", ("=2", "=4"), WHOLE),
        ("accelerate launch", ("", ""), BY_BLOCK),
        ("accelerate launch", ("--multi_gpu", "--use_fsdp --fsdp_version 2"), WHOLE),
    ],
    ids=["torchrun", "four", "accelerate", "fsdp"],
)
def test_the_launchers_give_the_plan_and_the_losses_of_one_process(
    launcher: str,
    change: tuple[str, str],
    more: dict[str, str],
    tmp_path: Path,
    recovered: Callable[[str], Path],
) -> None:
    line = re.search(rf"^    ({launcher} .*)$", PAGE.read_text(encoding="utf-8"), re.M)[1]
    asked = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in (SHORT | SHARED | more).items())
    for old, new in (
        ("MODEL", str(MODEL)),
        ("OUT", str(tmp_path / "out")),
        ("train.jsonl", str(SAMPLES / "train.jsonl")),
        ("--resume", f"--resume {asked} --export none --no-profile"),
        change,
    ):
        assert old in line, old
        line = line.replace(old, new, 1)
    together([(line.split(), {})])
    alone = recovered(more["recover"])
    assert kept(tmp_path / "out") == kept(alone)
    assert learnt(tmp_path / "out") == pytest.approx(learnt(alone), rel=1e-3)


def test_slurm_runs_the_batch_script_on_two_nodes(tmp_path: Path, short: Path, plan: dict) -> None:
    if lacking := slurm.missing():
        pytest.skip(lacking)
    script = tmp_path / "job.sh"
    gpus = (" --gpus-per-node=8", ""), ("--nproc-per-node=8", "--nproc-per-node=1"), ("29500", free_port())
    script.write_text(here(recipe("bash"), tmp_path / "out", *gpus), encoding="utf-8")
    with slurm.cluster(short):
        slurm.submit(script)
    assert kept(tmp_path / "out") == plan


def test_kubernetes_knows_the_manifests_and_the_containers_end_well(tmp_path: Path, plan: dict) -> None:
    (tmp_path / "job.yaml").write_text(recipe("yaml"), encoding="utf-8")
    words = [sys.executable, "-m", "kubernetes_validate", "--strict", tmp_path / "job.yaml"]
    subprocess.run(words, env={**os.environ, **INSTALLED}, check=True, timeout=PATIENCE)
    service, job = yaml.safe_load_all(recipe("yaml"))
    pod = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {
        "job-name": job["metadata"]["name"]
    }
    (container,) = pod["containers"]
    first = f"{job['metadata']['name']}-0.{pod['subdomain']}"  # what the first pod of an indexed Job is called
    gpus = (first, "127.0.0.1"), ("--nproc-per-node=8", "--nproc-per-node=1"), ("29500", free_port())
    words = [*container["command"], here(container["args"][0], tmp_path / "out", *gpus)]
    together([(words, {"JOB_COMPLETION_INDEX": str(index)}) for index in range(job["spec"]["completions"])])
    assert kept(tmp_path / "out") == plan


def test_ray_train_joins_the_processes(tmp_path: Path, short: Path, plan: dict) -> None:
    gpus = ("num_workers=16, use_gpu=True", "num_workers=2"), ("cpu:gloo,cuda:nccl", "gloo")
    (tmp_path / "job.py").write_text(here(recipe("python"), tmp_path / "out", *gpus), encoding="utf-8")
    where = {"RAY_TMPDIR": str(short), "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)}
    together([([sys.executable, str(tmp_path / "job.py")], where | INSTALLED)])
    assert kept(tmp_path / "out") == plan


def together(commands: Sequence[tuple[list[str], dict[str, str]]]) -> None:
    """Run the commands, each with some variables of its own; all end well."""
    running = [
        subprocess.Popen(words, env={**os.environ, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for words, more in commands
    ]
    said = [process.communicate(timeout=PATIENCE)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(said)[-5000:]
