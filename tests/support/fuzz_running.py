"""Run a case in a process of its own, and judge it: no traceback, no hang, no changed input."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import resource
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fuzz_cases import Case, draw

LIMIT_SECONDS = 120.0  # of one case: the slowest sound one takes a twentieth of it
ALLOWED = (0, 2, 3, 4)  # exit codes
CHANGING = {"recover": ("run",), "report": ("run/report.html", "run/report.md"), "profile": ("run/profile.json",)}


@dataclass(frozen=True)
class Outcome:
    """What became of a case; `said` is its stderr."""

    seed: int
    command: str
    line: str
    code: int | None  # None: stopped at the time limit
    changed: tuple[str, ...]
    seconds: float
    said: str

    @property
    def traceback(self) -> bool:
        """Whether it ended as a bug ends."""
        return self.code is not None and (self.code not in ALLOWED or "Traceback (most recent" in self.said)

    @property
    def hang(self) -> bool:
        """Whether it had to be stopped."""
        return self.code is None

    @property
    def fault(self) -> bool:
        """Whether anything is wrong with it."""
        return self.traceback or self.hang or bool(self.changed)


def prepare() -> None:
    """Import what commands import, so that no case pays for it. No thread is started, so that forking is safe."""
    import torch

    torch.set_num_threads(1)
    import slimvlm.compress.recovery.distillation.distiller
    import slimvlm.compress.recovery.training.trainer
    import slimvlm.export.job
    import slimvlm.kernels.bench
    import slimvlm.pipeline
    import slimvlm.serve.chat
    import slimvlm.serve.profiling
    import slimvlm.serve.report  # noqa: F401


def ready_to_fork() -> None:
    """No child looks for garbage in what is there before it: it would copy all of it."""
    gc.collect()
    gc.freeze()


def run_all(seeds: Sequence[int], base: Path, families: Sequence[str], jobs: int = 1) -> Iterator[Outcome]:
    """The cases of `seeds`, in any order."""
    ready_to_fork()
    one = partial(run_seed, base=base, families=families)
    if jobs == 1:
        yield from map(one, seeds)
        return
    # Of a Pool the processes are daemons, which may start none: a profile starts its own.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for done in as_completed([pool.submit(one, seed) for seed in seeds]):
            yield done.result()


def run_seed(seed: int, base: Path, families: Sequence[str]) -> Outcome:
    """Draw and run one case in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name) / "case"
        folder.mkdir()
        case = draw(seed, base, folder, families)
        return run_case(case, folder, Path(name))


def run_case(case: Case, folder: Path, beside: Path) -> Outcome:
    """Run `case`, whose files lie in `folder`; what it prints is kept in `beside`."""
    before = _digests(folder)
    started = time.monotonic()
    (beside / "in").write_text(case.typed, encoding="utf-8", errors="surrogateescape")
    child = os.fork()
    if child == 0:
        _become(case, folder, beside)
    code = _wait(child, started + LIMIT_SECONDS)
    seconds = time.monotonic() - started
    after = _digests(folder)
    free = CHANGING.get(case.command, ())
    changed = tuple(
        name
        for name, digest in before.items()
        if after.get(name) != digest and not any(name == one or name.startswith(one + "/") for one in free)
    )
    said = (beside / "err").read_text(encoding="utf-8", errors="replace")
    line = f"{' '.join(map(_shown, case.words))}   [{case.family}; {'; '.join(case.wrong)}]"
    return Outcome(case.seed, case.command, line, code, changed, seconds, said)


def _become(case: Case, folder: Path, beside: Path) -> None:
    """In the child: be `slimvlm` in `folder`, then end."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number, name, flags in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
            os.dup2(os.open(beside / name, flags | os.O_CREAT, 0o600), number)
        sys.stdin = open(0, encoding="utf-8", errors="strict", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ.update(case.environment)
        if case.memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (pages + case.memory, resource.RLIM_INFINITY))
        code = _call(case.words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _call(words: list[str]) -> int:
    from slimvlm.cli import main

    sys.argv = ["slimvlm", *words]
    try:
        main.main(words, prog_name="slimvlm")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
    return 1


def _wait(child: int, deadline: float) -> int | None:
    """The exit code (negative: the signal it died of), None if it was stopped at `deadline`."""
    pause = 0.002
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _end(child)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            _end(child)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)


def _end(group: int) -> None:
    """The processes it started end with it."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _digests(folder: Path) -> dict[str, str]:
    """Name -> what is there, of everything in `folder`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            link = str(path.readlink()) if stat.S_ISLNK(mode) else ""
            found[str(path.relative_to(folder))] = f"{stat.S_IFMT(mode)} {link}"
    return found


def _shown(word: str) -> str:
    shown = word if word.isascii() and word.isprintable() and word and " " not in word else repr(word)
    return shown if len(shown) < 80 else shown[:60] + "..."
