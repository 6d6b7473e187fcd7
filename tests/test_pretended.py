"""Every family on a pretended GPU (support/pretended.py): in a process of its own, Triton reads its variable once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pretended
import pytest
import torch
from pretended import waits
from pretended_cuda import two_devices
from tiny_models import FACTORIES
from torch import nn

from slimvlm.compress.errors import DeviceError, SlimvlmError
from slimvlm.compress.processes import pick_device
from slimvlm.compress.recovery.recover import precision
from slimvlm.serve.measuring.bench import Bench, Source

FAMILIES = Path(__file__).parent / "pretended" / "families.py"


def test_every_family_runs_on_the_second_of_two_devices() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    options = ["-v", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *options, FAMILIES],
        cwd=FAMILIES.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    for what, times in (("the_whole_job", 1), ("statistics", 3)):
        assert len(re.findall(rf"::test_{what}.* PASSED", result.stdout)) == times * len(FACTORIES)


def test_tensors_of_two_devices_do_not_mix_and_scalars_do() -> None:
    with two_devices():
        host, first, second = torch.ones(2, 2), torch.ones(2, 2, device="cuda"), torch.ones(2, 2, device="cuda:1")
        for one, other in ((host, first), (first, second), (second, host)):
            for compute in (torch.add, torch.matmul, torch.nn.functional.linear):
                with pytest.raises(RuntimeError, match="same device"):
                    compute(one, other)
        assert (first + torch.tensor(1.0)).device == torch.device("cuda", 0)
        assert (second @ second).device == torch.zeros_like(second).device == torch.device("cuda", 1)
        with pytest.raises(TypeError, match="numpy"):
            second.numpy()
        with pytest.raises(RuntimeError, match="ordinal"):
            host.to("cuda:2")
        torch.cuda.set_device(1)
        assert torch.ones(1, device="cuda").device == torch.device("cuda", 1)


def test_a_module_moves_with_its_ties_and_gradients_come_back_from_another_device() -> None:
    with two_devices():
        model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
        model["two"].weight = model["one"].weight
        before = model["one"].weight
        model.to("cuda:1")
        assert model["two"].weight is model["one"].weight is before
        assert isinstance(before, nn.Parameter) and before.device == torch.device("cuda", 1)
        given = torch.ones(2, 3, requires_grad=True)
        model["one"](given.to("cuda:1")).cpu().sum().backward()
        assert given.grad.device == torch.device("cpu") and before.grad.device == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("call", "waiting"),
    [
        (lambda x, m: x.sum().item(), True),
        (lambda x, m: x.tolist(), True),
        (lambda x, m: x.cpu(), True),
        (lambda x, m: x.to("cpu", non_blocking=True), False),
        (lambda x, m: torch.ones(2).to(x.device), True),
        (lambda x, m: torch.ones(2).to(x.device, non_blocking=True), False),
        (lambda x, m: torch.tensor([1.0], device=x.device), True),
        (lambda x, m: torch.arange(3, device=x.device), False),
        (lambda x, m: bool((x > 0).all()), True),
        (lambda x, m: m.nonzero(), True),
        (lambda x, m: x[m], True),
        (lambda x, m: x.masked_fill(m, 0), False),
        (lambda x, m: x[torch.tensor([0, 1], device=x.device)], True),  # for the index
        (lambda x, m: x.copy_(x.clone()), False),
        (lambda x, m: torch.cuda.synchronize(), True),
    ],
)
def test_waits_for_the_device_are_counted(call, waiting: bool) -> None:
    with two_devices():
        x = torch.ones(4, device="cuda:1")
        mask = x > 0
        waits.clear()
        call(x, mask)
        assert len(waits) == waiting and not any(wait.ours for wait in waits)
    assert pretended.current[0] == 0


def test_the_device_that_is_picked_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with two_devices():
        assert pick_device("cuda:1") == torch.device("cuda", 1)
        assert torch.cuda.current_device() == 1
        assert torch.zeros(1, device="cuda").device == torch.device("cuda", 1)
        assert pick_device("auto") == torch.device("cuda", 0)
        for text, local, says in (("cuda:3", None, "'cuda:3' asks for a GPU"), ("cuda", "2", "LOCAL_RANK=2")):
            if local is not None:
                monkeypatch.setenv("LOCAL_RANK", local)
            with pytest.raises(DeviceError, match=says):
                pick_device(text)


def test_what_is_profiled_watches_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with two_devices():
        with pytest.raises(SlimvlmError, match="nowhere"):
            Bench(Source("nowhere", "torch", "cuda:1", "cuda:1", 1, "auto")).load()
        assert torch.cuda.current_device() == 1


@pytest.mark.parametrize(("emulated", "chosen"), [(False, "bf16"), (True, "fp16")])
def test_bf16_is_chosen_where_the_device_has_it_itself(emulated, chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    with two_devices():
        told = {True: True, False: not emulated}
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: told[including_emulation])
        assert precision("auto", torch.device("cuda", 1)) == chosen
