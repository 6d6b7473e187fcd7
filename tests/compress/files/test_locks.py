"""Two processes never write one folder: the second is told who does, and a killed one leaves no lock."""

import errno
import fcntl
import inspect
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from slimvlm.compress.errors import OutputError
from slimvlm.compress.files.locks import locked_file, locked_folder

HOLD = """
import sys
from pathlib import Path
from slimvlm.compress.files.locks import locked_file, locked_folder
with {lock}(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("lock", (locked_folder, locked_file), ids=("folder", "file"))
def test_a_second_process_is_told_who_holds_it_until_the_first_is_killed(tmp_path, lock):
    path, command = tmp_path / "out", [sys.executable, "-c", HOLD.format(lock=lock.__name__)]
    with subprocess.Popen([*command, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as holder:
        assert holder.stdout.readline() == b"held\n"
        who = re.escape(f"out is in use by process {holder.pid} on {socket.gethostname()} since 20")
        with pytest.raises(OutputError, match=who), lock(path):
            pass
        holder.send_signal(signal.SIGKILL)
    with lock(path):
        pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def refusing(*_: object) -> None:
    """What flock says on a file system that knows no locks."""
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_of_the_file_system_the_file_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing)
    hold = f"import fcntl, errno\n{inspect.getsource(refusing)}\nfcntl.flock = refusing\n" + HOLD.format(
        lock="locked_folder"
    )
    command = [sys.executable, "-c", hold, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as holder:
        assert holder.stdout.readline() == b"held\n"
        who = rf"in use by process {holder.pid} on .*or remove {re.escape(str(tmp_path))}/\.lock, if that has ended"
        with pytest.raises(OutputError, match=who), locked_folder(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    with locked_folder(tmp_path):  # whose holder is gone, from this host
        assert os.listdir(tmp_path) == [".lock"]  # noqa: PTH208
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere", "since": "2026"}')
    with pytest.raises(OutputError, match="process 1 on elsewhere since 2026.*remove"), locked_folder(tmp_path):
        pass


def test_what_a_process_holds_it_may_lock_again(tmp_path):
    with locked_folder(tmp_path / "out"):
        with locked_folder(tmp_path / "out"):
            (tmp_path / "out" / "a").touch()
        assert sorted(os.listdir(tmp_path / "out")) == [".lock", "a"]  # noqa: PTH208 (names are enough)
    assert os.listdir(tmp_path / "out") == ["a"]  # noqa: PTH208


@pytest.mark.parametrize("content", ("", "not JSON", '{"pid": "x"}', "\0" * 5000))
def test_a_holder_that_says_nothing_of_itself_is_another_process(tmp_path, content):
    with (tmp_path / ".lock").open("w") as file:
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="in use by another process"), locked_folder(tmp_path):
            pass


def test_a_lock_is_not_taken_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("somebody's")
    (tmp_path / ".lock").symlink_to("victim")
    with pytest.raises(OutputError, match="cannot write"), locked_folder(tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "somebody's"
