"""A process per model: what it says of itself, and how its end is told. The faults are real ones."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
from profiling import save_pair, torch_source

from slimvlm.compress.errors import CheckpointError
from slimvlm.serve.measuring.worker import Worker, WorkerLostError
from slimvlm.serve.profile import FAILED, OUT_OF_MEMORY

GIB = 2**30


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))[0]


@pytest.fixture
def worker(dense):
    with Worker("dense", torch_source(dense)) as worker:
        yield worker


def text(rows, length):
    ids = np.full((rows, length), 5)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_a_worker_loads_runs_and_says_what_memory_it_took(worker):
    loaded = worker.call("load")
    assert loaded["dtype"] == "fp32"
    assert loaded["seconds"] > 0
    worker.call("place", text(2, 8))
    runs = worker.call("turn", 4, 3)
    assert [set(run) for run in runs] == 3 * [{"prefill", "ttft", "tpot", "end_to_end"}]
    assert worker.call("tokens", 4).shape == (2, 4)
    memory = worker.call("memory")
    assert 0 < memory.host_loaded_bytes <= memory.host_peak_bytes < GIB
    assert 0 <= memory.host_mapped_bytes < GIB
    assert memory.device_peak_bytes is None
    assert worker.call("joules_per_token", 4, 2, 0.1) is None


def test_peak_memory_is_what_this_process_needed(worker):
    worker.call("load")
    worker.call("place", text(1, 8))
    worker.call("turn", 2, 1)
    before = worker.call("memory").host_peak_bytes
    worker.call("place", text(64, 200))
    worker.call("turn", 2, 1)
    logits = 64 * 40 * 200 * 4  # of one hidden state of an MLP, bytes: more than one is alive
    assert worker.call("memory").host_peak_bytes - before > logits


def test_a_worker_beyond_its_address_space_is_out_of_memory_and_lives_on(worker):
    worker.call("load")
    used = psutil.Process(worker.pid).memory_info().vms
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (used + GIB // 4, resource.RLIM_INFINITY))
    worker.call("place", text(4096, 250))
    with pytest.raises(WorkerLostError, match="dense: .*(memory|alloc)") as lost:
        worker.call("turn", 2, 1)
    assert lost.value.status == OUT_OF_MEMORY
    worker.call("place", text(1, 4))
    assert worker.call("turn", 2, 1)


def test_a_worker_the_system_kills_is_out_of_memory(worker):
    worker.call("load")
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="killed by the system") as lost:
        worker.call("memory")
    assert lost.value.status == OUT_OF_MEMORY


def test_a_worker_that_ends_otherwise_has_failed(worker):
    worker.call("load")
    os.kill(worker.pid, signal.SIGTERM)
    with pytest.raises(WorkerLostError, match="SIGTERM") as lost:
        worker.call("memory")
    assert lost.value.status == FAILED


def test_what_a_worker_refuses_is_refused_here_in_the_same_words(tmp_path):
    with Worker("slim", torch_source(str(tmp_path))) as worker, pytest.raises(CheckpointError, match="no config.json"):
        worker.call("load")


def test_no_process_is_left_behind(dense):
    with Worker("dense", torch_source(dense)) as worker:
        process = psutil.Process(worker.pid)
    assert not process.is_running()


def test_a_script_without_a_guard_is_not_run_again_by_its_workers(dense, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from slimvlm.serve.measuring.bench import Source\n"
        "from slimvlm.serve.measuring.worker import Worker\n"
        "print('run')\n"
        f"with Worker('dense', Source({dense!r}, 'torch', 'cpu', 'cpu', 1, 'auto')) as worker:\n"
        "    print(worker.call('load')['dtype'])\n"
    )
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the current folder was imported')\n")
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    words = [sys.executable, script]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["run", "fp32"], done.stderr
