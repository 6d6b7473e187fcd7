"""What a training keeps on disk."""

import sys
from dataclasses import asdict

import pytest
import torch
from torch import nn

from slimvlm.compress.errors import OutputError, RecoveryError
from slimvlm.compress.recovery.training.history import History
from slimvlm.compress.recovery.training.state import STATE, StateFolder, load_best, make_moments, moments


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 2), value)}


def facts_of(facts: History) -> dict[str, object]:
    """What a checkpoint says."""
    return {"facts": asdict(facts), "training": {"seed": 3}, "scaler": None}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path) -> None:
    facts = History(steps=7, seconds=0.1 + 0.2, best=(0.1, -sys.float_info.max), best_file="best-00000001")
    given = {**tensors(0.1), "step": torch.tensor(7.0), "half": torch.arange(6).to(torch.bfloat16).view(2, 3).T}
    StateFolder(tmp_path).save(given, facts_of(facts), 7, best="")
    files = StateFolder(tmp_path)
    saved = files.load()
    assert saved is not None and saved == {
        **facts_of(facts),
        "facts": facts,
        "tensors": saved["tensors"],
        "best_file": "",
    }
    assert files.shapes(saved["tensors"]) == {name: value.shape for name, value in given.items()}
    found = {name: torch.zeros_like(value) for name, value in given.items()}
    files.fill(saved["tensors"], found)
    assert all(torch.equal(value, given[name]) for name, value in found.items())


def test_there_is_no_checkpoint_in_a_new_folder(tmp_path) -> None:
    assert StateFolder(tmp_path / "new").load() is None


def test_best_weights_stay_as_long_as_the_checkpoint_names_them(tmp_path) -> None:
    files = StateFolder(tmp_path)
    first = files.save_best(tensors(1), 1)
    files.save(tensors(1), {}, 1, first)
    files.save_best(tensors(2), 2)
    third = files.save_best(tensors(3), 3)  # a process killed now goes on from the checkpoint, which names the first
    assert names(tmp_path) == [first, third, "state-00000001", STATE]
    files.save(tensors(3), {}, 3, third)
    assert names(tmp_path) == [third, "state-00000003", STATE]


def test_what_a_killed_process_left_of_a_checkpoint_is_no_part_of_the_next(tmp_path) -> None:
    StateFolder(tmp_path).save(tensors(1), facts_of(History()), 2, "")
    (tmp_path / STATE).unlink()  # killed before it had a name
    shard = next((tmp_path / "state-00000002").iterdir())
    shard.rename(shard.with_name("shard-00002-model-00001-of-00001.safetensors"))
    files = StateFolder(tmp_path)
    files.save({"other": torch.ones(1)}, facts_of(History()), 2, "")
    assert files.shapes("state-00000002") == {"other": torch.Size([1])}


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff" * 64, b'{"tensors": "../model"}'])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage) -> None:
    (tmp_path / STATE).write_bytes(damage)
    with pytest.raises(RecoveryError, match=STATE):
        StateFolder(tmp_path).load()


@pytest.mark.parametrize("damage", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", None])
def test_damaged_tensors_are_refused_by_name(tmp_path, damage) -> None:
    files = StateFolder(tmp_path)
    best = files.save_best(tensors(1), 3)
    (shard,) = (tmp_path / best).iterdir()
    shard.write_bytes(shard.read_bytes()[:-4] if damage is None else damage)
    with pytest.raises(RecoveryError, match=best):
        files.fill(best, tensors(0))


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path) -> None:
    files = StateFolder(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    (tmp_path / "gone").write_text("a file")
    with pytest.raises(OutputError, match="gone"):
        files.save(tensors(1), {}, 1, "")


def test_adamw_goes_on_from_its_moments() -> None:
    def steps(layer: nn.Linear, optimizer: torch.optim.AdamW, count: int) -> None:
        for _ in range(count):
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    whole = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.1)
    steps(whole, optimizer, 2)
    resumed = nn.Linear(3, 2)
    resumed.load_state_dict(whole.state_dict())
    fresh = torch.optim.AdamW(resumed.parameters(), lr=0.1)
    remembered = moments(optimizer, dict(whole.named_parameters()))
    room = make_moments(fresh, dict(resumed.named_parameters()), remembered)
    assert room.keys() == remembered.keys()
    for name, value in room.items():
        value.copy_(remembered[name])
    steps(whole, optimizer, 3)
    steps(resumed, fresh, 3)
    assert torch.equal(whole.weight, resumed.weight)


def test_the_best_weights_of_another_student_are_refused(tmp_path) -> None:
    with pytest.raises(RecoveryError, match="no training"):
        load_best(nn.Linear(2, 3), tmp_path)
    files = StateFolder(tmp_path)
    files.save({}, facts_of(History()), 1, files.save_best(tensors(1), 1))
    with pytest.raises(RecoveryError, match="no weight of this shape"):
        load_best(nn.Linear(3, 3), tmp_path)
    student = nn.Linear(2, 3)
    load_best(student, tmp_path)
    assert torch.equal(student.weight, tensors(1)["weight"])
