"""A model that leaves its checkpoint's file: its values stay, the file's pages go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from slimvlm.compress.slicing.mapped import leave_files

pytestmark = pytest.mark.skipif(not Path("/proc/self/pagemap").is_file(), reason="pages are listed in /proc")

SIZE = 2**20  # values, 4 MiB


def mapped_model(path: Path) -> nn.Module:
    """Four weights of 4 MiB that are the pages of `path`."""
    save_file({f"{index}.weight": torch.randn(SIZE // 64, 64) for index in range(4)}, path)
    model = nn.Sequential(*(nn.Linear(64, SIZE // 64, bias=False, device="meta") for _ in range(4)))
    with safe_open(path, "pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)  # noqa: SIM118
    return model


def resident(path: Path) -> int:
    """Bytes of the file that are in this process's memory."""
    sizes, inside = 0, False
    for words in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
        if not words[0].endswith(":"):
            inside = words[-1] == str(path)
        elif words[0] == "Rss:" and inside:
            sizes += 1024 * int(words[1])
    return sizes


def test_pages_are_given_back_though_one_weight_stays_in_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    model = mapped_model(path)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    held = model.get_parameter("3.weight").detach()
    before = resident(path)
    leave_files(model)
    assert before > 15 * SIZE
    assert resident(path) < SIZE
    assert torch.equal(held, expected["3.weight"])
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_what_was_changed_in_the_file_s_pages_is_not_lost_to_others(tmp_path):
    model = mapped_model(tmp_path / "model.safetensors")
    held = model.get_parameter("1.weight").detach()
    held[::1000] = 1.0
    expected = held.clone()
    leave_files(model)
    assert torch.equal(held, expected)
    assert torch.equal(model.get_parameter("1.weight"), expected)


def test_a_model_of_its_own_weights_is_not_copied(tmp_path):
    model = mapped_model(tmp_path / "model.safetensors")
    leave_files(model)
    places = [weight.data_ptr() for weight in model.parameters()]
    leave_files(model)
    assert [weight.data_ptr() for weight in model.parameters()] == places


def test_where_pages_are_not_listed_the_model_leaves_the_file_all_the_same(tmp_path, monkeypatch):
    model = mapped_model(tmp_path / "model.safetensors")
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    pages, opened = Path("/proc/self/pagemap"), Path.open

    def refuse(path, *arguments, **options):
        if path == pages:
            raise PermissionError(path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    leave_files(model)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
