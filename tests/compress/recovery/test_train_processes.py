"""Training by several processes: the loss of one, with copies of the weights and with shards of them."""

import json
from pathlib import Path

import pytest
import torch
from blockwise_training import blockwise_training
from pairs import run_together
from safetensors import safe_open
from staged_training import TRAININGS, staged_training
from toy_distiller import ToyDistiller, toy_task
from train_options import train_options

from slimvlm.compress.recovery.training.state import load_best
from slimvlm.compress.recovery.training.trainer import train

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}

WORKER = """
import os, signal, sys
from pathlib import Path
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from toy_distiller import ToyDistiller, token_loss, toy_task
from slimvlm.compress import processes
from train_options import train_options
from slimvlm.compress.recovery.training.trainer import train

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{sys.argv[3]}", rank=rank, world_size=world)
distiller = ToyDistiller()
options = train_options(steps=6, train_batch_size=5, learning_rate=1e-2, checkpoint_every=2, validate_every=3)

def validate():
    return 0.0, -token_loss(distiller.student)

def progress(stage, step, of, note):
    if step == steps:
        os.kill(os.getpid(), signal.SIGTERM)  # this one only; the others are told by it

train(distiller, toy_task(validate=validate), options, folder / "run", progress)
sharded = [isinstance(value, DTensor) for value in distiller.parameters()]
assert all(sharded) if "ACCELERATE_USE_FSDP" in os.environ else not any(sharded)
processes.leave()
"""

STAGED_WORKER = """
import os, sys
from pathlib import Path
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from staged_training import TRAININGS, staged_training
from slimvlm.compress import processes
from slimvlm.compress.errors import UnsuitableOptionError

folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{sys.argv[3]}", rank=rank, world_size=world)
sharded = "ACCELERATE_USE_FSDP" in os.environ
for training in TRAININGS:
    try:
        distiller = staged_training(folder / "-".join(training), *training)
    except UnsuitableOptionError as error:
        assert sharded and "logit_scale is a single number" in str(error)
    else:
        assert all(isinstance(value, DTensor) == sharded for value in distiller.parameters())
processes.leave()
"""

BLOCKS_WORKER = """
import json, os, sys
from pathlib import Path
import torch
from torch import distributed
from safetensors.torch import save_file
from blockwise_training import blockwise_training
from slimvlm.compress import processes

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{sys.argv[3]}", rank=rank, world_size=2)
learnt, read = blockwise_training(folder / "run")
save_file(learnt, folder / f"learnt-{rank}.safetensors", {"read": json.dumps(read)})
processes.leave()
"""


def processes(folder: Path, count: int, steps: int = 100, worker: str = WORKER, **environment: str) -> set[int | None]:
    """Exit statuses. The processes meet through a file."""
    (folder / "worker.py").write_text(worker)
    words = [folder / "worker.py", folder, steps, len(list(folder.glob("meet*")))]
    return {process.returncode for process in run_together(folder, count, words, **environment)}


def curve(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "recovery.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, ToyDistiller]:
    folder, distiller = tmp_path_factory.mktemp("alone"), ToyDistiller()
    options = train_options(steps=6, train_batch_size=5, learning_rate=1e-2, checkpoint_every=2, validate_every=3)
    train(distiller, toy_task(), options, folder)
    return folder, distiller


def assert_as_alone(folder: Path, alone: tuple[Path, ToyDistiller]) -> None:
    for name in ("loss", "grad_norm"):
        assert curve(folder / "run", name) == pytest.approx(curve(alone[0], name), rel=1e-4)
    student = ToyDistiller().student
    load_best(student, folder / "run")
    for name, value in alone[1].student.state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_with_a_part_of_the_batch_follow_the_loss_of_one(count, tmp_path, alone) -> None:
    assert processes(tmp_path, count) == {0}
    assert_as_alone(tmp_path, alone)


def test_sharded_student_and_teacher_follow_the_loss_of_one_whoever_goes_on(tmp_path, alone) -> None:
    assert processes(tmp_path, 4, steps=2, **SHARDED) == {143}
    assert processes(tmp_path, 2, steps=4, **SHARDED) == {143}
    assert processes(tmp_path, 2) == {0}  # each with all weights
    assert_as_alone(tmp_path, alone)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What one process makes of every training."""
    folder = tmp_path_factory.mktemp("trained")
    for training in TRAININGS:
        staged_training(folder / "-".join(training), *training)
    return folder


@pytest.mark.parametrize(("count", "sharding"), [(2, {}), (4, {}), (2, SHARDED)], ids=["two", "four", "shards"])
def test_every_loss_of_samples_that_processes_share_is_that_of_one(count, sharding, tmp_path, trained) -> None:
    """They have different numbers of samples and tokens, and pairs are told apart from those of all processes."""
    assert processes(tmp_path, count, worker=STAGED_WORKER, **sharding) == {0}
    there = [training for training in map("-".join, TRAININGS) if (tmp_path / training).exists()]
    assert len(there) == len(TRAININGS) - bool(sharding)  # CLIP has no shards
    for training in there:
        for name in ("loss", "parts", "grad_norm"):
            for mine, expected in zip(curve(tmp_path / training, name), curve(trained / training, name), strict=True):
                assert mine == pytest.approx(expected, rel=1e-4, abs=1e-8), (training, name)


def test_two_processes_share_the_blocks_and_both_have_what_one_learns(tmp_path: Path) -> None:
    """Each block is learnt by one of them; on a frozen base they then train the whole together."""
    alone, everyone = blockwise_training(tmp_path / "alone")
    assert processes(tmp_path, 2, worker=BLOCKS_WORKER) == {0}
    read = []
    for rank in range(2):
        with safe_open(tmp_path / f"learnt-{rank}.safetensors", "pt") as file:
            read.append(json.loads(file.metadata()["read"]))
            assert set(file.keys()) == alone.keys()
            for name, value in alone.items():
                torch.testing.assert_close(file.get_tensor(name), value, rtol=1e-4, atol=1e-6)
    assert read == [everyone[0::2], everyone[1::2]]
