"""`slimvlm selfcheck`: every check has a verdict, none ends the others, and the last line says it all."""

import json
import shutil
import sys
import time

import psutil
import pytest
import torch
from click.testing import CliRunner
from pretended_cuda import two_devices

from slimvlm.cli import main
from slimvlm.demo import MODEL
from slimvlm.kernels.dispatch import why_not_triton
from slimvlm.kernels.workloads import Shape
from slimvlm.selfcheck import kernels, machine, run, running, several
from slimvlm.selfcheck.outcome import FAIL, PASS, SKIP, SkippedError, WrongError

ON_GPUS = {"energy", "triton", "clock torch", "clock onnx", "other GPU"}


def test_everything_is_tried_on_a_cpu_and_nothing_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["selfcheck", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    verdicts = {check["name"]: check["verdict"] for check in found["checks"]}
    assert list(verdicts) == list(run.CHECKS)
    assert {name for name, verdict in verdicts.items() if verdict == SKIP} == ON_GPUS
    assert {verdict for name, verdict in verdicts.items() if name not in ON_GPUS} == {PASS} and found["passed"]
    assert all(check["seconds"] >= 0 and check["detail"] for check in found["checks"])
    assert "17 PASS, 0 FAIL, 5 SKIP" in found["summary"] and "\n" not in found["summary"]
    assert "torch 2." in found["summary"] and "transformers 5." in found["summary"]
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.fixture
def few_checks(monkeypatch):
    """Checks that end in every way there is."""

    def ending(error):
        def check(ground):
            raise error

        return check

    ways = {
        "passes": lambda ground: "is well",
        "breaks": ending(RuntimeError("the first line\nand more")),
        "is wrong": ending(WrongError("1 was found, accepted is 2")),
        "is missing": ending(SkippedError("there is no such thing here")),
    }
    for name, check in ways.items():
        monkeypatch.setattr(machine, name.replace(" ", "_"), check, raising=False)
    checks = {name: ("machine", name.replace(" ", "_")) for name in ways}
    monkeypatch.setattr(run, "CHECKS", {"cannot be imported": ("no_such_module", "check"), **checks})


def test_a_check_that_fails_ends_no_other_and_the_command_with_exit_code_4(few_checks):
    done = CliRunner().invoke(main, ["selfcheck", "--device", "cpu"])
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:5]] == [FAIL, PASS, FAIL, FAIL, SKIP]
    assert lines[0].endswith("ModuleNotFoundError: No module named 'slimvlm.selfcheck.no_such_module'")
    assert lines[2].endswith("s  RuntimeError: the first line")
    assert lines[-1].startswith(
        "slimvlm selfcheck on cpu: 1 PASS, 3 FAIL (cannot be imported, breaks, is wrong), 1 SKIP (is missing) in 0 s"
    )
    assert done.exit_code == 4
    assert done.stderr == "Error: 3 of 5 checks failed: cannot be imported, breaks, is wrong\n"


def test_the_document_keeps_where_an_unexpected_error_came_from(few_checks):
    done = CliRunner().invoke(main, ["selfcheck", "--device", "cpu", "--json"])
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.exit_code == 4 and "in check\n" in checks["breaks"]["trace"]
    assert checks["is wrong"]["trace"] is None and checks["is wrong"]["detail"] == "1 was found, accepted is 2"


def test_what_an_earlier_check_should_have_made_is_asked_for(monkeypatch):
    later = {"recovery": ("job", "check_recovery"), "profile torch": ("running", "check_profile", "torch")}
    monkeypatch.setattr(run, "CHECKS", later)
    report = run.selfcheck("cpu")
    assert report.named(SKIP) == list(later)
    assert [outcome.detail for outcome in report.outcomes] == [
        "needs what the check `slice and refit` makes",
        "needs what the check `recovery` makes",
    ]


class HostEvent:
    """An event of a device that has done its work when a call returns."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: "HostEvent") -> float:
        return 1000 * (later.seconds - self.seconds)


def test_a_gpu_is_checked_by_its_own_counters_and_clock_and_without_triton_by_torch(monkeypatch):
    """On the second of two pretended ones, which Triton cannot launch on."""

    def recovery(ground):
        shutil.copytree(MODEL, ground.folder / running.RUN)
        return "the dense model stands for the recovered one"

    monkeypatch.setattr(machine, "recovery", recovery, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(kernels, "SHAPES", [Shape("SmolVLM, tiny", "gate", 48, 32)])
    monkeypatch.setattr(running, "TOKENS", 2)
    monkeypatch.setattr(running, "REPEATS", 2)
    names = ("device", "memory", "energy", "triton", "kernel norms", "clock torch", "clock onnx")
    checks = {name: run.CHECKS[name] for name in names}
    monkeypatch.setattr(run, "CHECKS", {"recovery": ("machine", "recovery"), **checks})
    why_not_triton.cache_clear()
    with two_devices(), pytest.warns(RuntimeWarning, match="triton's first launch failed"):
        report = run.selfcheck("cuda:1")
    why_not_triton.cache_clear()
    details = {outcome.name: outcome.detail for outcome in report.outcomes}
    assert report.named(FAIL) == ["triton"] and report.named(SKIP) == ["energy", "clock onnx"], details
    assert details["triton"].endswith("plain torch takes the kernels' place")
    assert "pretended 1, sm_90" in details["device"] and "blocked torch" in details["kernel norms"]
    assert details["memory"] == "the driver's count grew by 256 of 256 MiB"
    assert "ms by the device's events" in details["clock torch"]
    assert report.summary().startswith("slimvlm selfcheck on cuda:1: 5 PASS, 1 FAIL (triton), 2 SKIP")


def test_processes_that_wait_for_each_other_are_ended_with_all_they_started(tmp_path):
    said = tmp_path / "child"
    child = "import os, time; os.write(1, str(os.getpid()).encode()); time.sleep(600)"
    start = "subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True, stdout=open(sys.argv[2], 'w'))"
    with pytest.raises(WrongError, match="two processes did not end within 2 s"):
        several.run_or_end([sys.executable, "-c", f"import subprocess, sys; {start}", child, str(said)], 2)
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(int(said.read_text())).wait(5)
        psutil.Process(int(said.read_text()))


def test_a_device_that_is_not_there_is_refused():
    done = CliRunner().invoke(main, ["selfcheck", "--device", "cuda:7"])
    assert done.exit_code == 3 and "cuda:7" in done.stderr
