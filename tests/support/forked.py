"""Real processes that begin with everything imported: forked from one that waits, so that none pays seconds of imports.

Each is a process of the system as any other: it has its number, its variables and its files, and can be killed.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import NoReturn

WAITS = 300.0  # seconds for an answer


class Forked:
    """A process in `folder` that runs `words`: `slimvlm` and what follows, or a script and what follows.

    Use as a context: it is gone afterwards. What it prints is in `folder`.
    """

    def __init__(self, folder: Path, *words: object, **environment: str) -> None:
        self.returncode: int | None = None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAITS)
        self._socket.connect(_waiting().args[-1])
        self._lines = self._socket.makefile("rw", encoding="utf-8")
        asked = [str(folder), [*map(str, words)], {**os.environ, **environment}]
        print(json.dumps(asked), file=self._lines, flush=True)
        self.pid = int(self._lines.readline())
        self.stdout, self.stderr = (folder / f"{self.pid}.{name}" for name in ("out", "err"))
        for file in (self.stdout, self.stderr):
            file.touch()

    def wait(self) -> int:
        """Its exit code; negative: the signal it died of."""
        if self.returncode is None:
            self.returncode = int(self._lines.readline())
        return self.returncode

    def runs(self, seconds: float = 0.02) -> bool:
        """Whether it has not ended within so many seconds."""
        return self.returncode is None and not select.select([self._socket], [], [], seconds)[0]

    def kill(self) -> int:
        """With SIGKILL and all it started."""
        if self.runs(0):
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._lines.close()
        self._socket.close()


@cache
def _waiting() -> subprocess.Popen[bytes]:
    """The one that waits, to be asked at its last argument; it ends when its input is closed, which our end does."""
    words = [sys.executable, "-P", __file__, str(Path(tempfile.mkdtemp(prefix="forked-")) / "socket")]
    waiting = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert waiting.stdout is not None and waiting.stdout.readline() == b"ready\n"
    return waiting


# ------------------------------------------------------------------ in the one that waits


def serve(path: str) -> None:
    """Import, then fork for everyone who asks."""
    sys.path.insert(0, str(Path(__file__).parent))
    from fuzz_running import prepare, ready_to_fork

    prepare()
    ready_to_fork()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            asking, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _keep(asking)
            asking.close()
    Path(path).unlink()
    Path(path).parent.rmdir()


def _keep(asking: socket.socket) -> NoReturn:
    """Start what is asked for, and tell its number and its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with asking, asking.makefile("rw", encoding="utf-8") as lines:
        folder, words, environment = json.loads(lines.readline())
        child = os.fork()
        if child == 0:
            asking.close()
            _become(folder, words, environment)
        print(child, file=lines, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=lines, flush=True)
    os._exit(0)


def _become(folder: str, words: list[str], environment: dict[str, str]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:] = words
        code = _run(words[0])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(program: str) -> int:
    try:
        if program == "slimvlm":
            from slimvlm.cli import main

            main()
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
