"""What one of several processes refuses they all refuse, with the same sentence."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from slimvlm.demo import MODEL, SAMPLES

WORDS = ["compress", str(MODEL), "--recover", "none", "--samples", "8", "--batch-size", "2", "--rounds", "1"]


def two_processes(*different: list[str | Path]) -> list[subprocess.CompletedProcess[str]]:
    """`slimvlm compress` in two processes that find each other; each with words of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", "from slimvlm.cli import main; main()", *WORDS, *map(str, words)],
            env={**shared, "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, words in enumerate(different)
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, said, strict=True)
    ]


def sentence(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 3, ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
    return next(line for line in ended.stderr.splitlines() if line.startswith("Error:"))


def test_a_folder_that_only_the_first_process_opens_is_refused_by_both(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("not ours")
    words = [tmp_path / "out", "--data", SAMPLES / "train.jsonl"]
    first, second = (sentence(ended) for ended in two_processes(words, words))
    assert first == second and str(tmp_path / "out") in first


def test_data_that_one_process_cannot_read_are_refused_by_the_one_that_computes_already(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no json\n")
    good, bad = ([tmp_path / "out", "--data", data] for data in (SAMPLES / "train.jsonl", tmp_path / "bad.jsonl"))
    first, second = (sentence(ended) for ended in two_processes(good, bad))
    assert first == second and "bad.jsonl" in first
