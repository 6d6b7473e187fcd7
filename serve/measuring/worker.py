"""A process of its own for one model in one cell: what it allocates is its own, and if it dies the others go on.

Processes are forked from a server that has imported torch and transformers once and done nothing else, so a start costs
milliseconds and CUDA is first touched in the process that uses it. Only one process computes at a time: it answers one
call, then waits.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from types import ModuleType
from typing import Any

from slimvlm.compress.errors import SlimvlmError, is_out_of_memory, one_line
from slimvlm.serve.measuring.bench import Bench, Source
from slimvlm.serve.profile import FAILED, OUT_OF_MEMORY

Sent = Any  # an argument or a result of a method of `Bench`, through a pipe
# What takes seconds to import and every worker needs.
PRELOADED = ("slimvlm.serve.measuring.worker", "transformers.modeling_utils", "transformers.generation")
PATIENCE = 10.0  # seconds a process is given to end when asked to


class WorkerLostError(Exception):
    """The worker of `model` cannot go on; `status` is OUT_OF_MEMORY or FAILED, the message says why."""

    def __init__(self, model: str, status: str, reason: str) -> None:
        super().__init__(f"{model}: {reason}")
        self.model, self.status = model, status


class Worker:
    """The calling side. Use as a context: the process is gone afterwards.

    Args:
        model: what it is called in messages.
    """

    def __init__(self, model: str, source: Source) -> None:
        self.model, context = model, clean_server()
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, source), daemon=True)
        with nameless_main():
            self._process.start()
        other.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # ends the loop of the process
        self._process.join(PATIENCE if self._process.exitcode is None else 0)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    def call(self, name: str, *arguments: Sent) -> Sent:
        """What the method `name` of `Bench` gives in the process.

        Raises:
            WorkerLostError: it ran out of memory, failed, or was killed.
            SlimvlmError: it refused, with its own message.
        """
        try:
            self._connection.send((name, arguments))
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerLostError(self.model, *self._ended()) from None
        if kind == "refused":
            raise value
        if kind != "done":
            raise WorkerLostError(self.model, kind, value)
        return value

    def _ended(self) -> tuple[str, str]:
        self._process.join(PATIENCE)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return OUT_OF_MEMORY, "the process was killed by the system, as it does where memory ends"
        what = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return FAILED, f"the process ended by itself ({what})"


@contextmanager
def nameless_main() -> Iterator[None]:
    """Without it every worker would run the caller's script again (as `__mp_main__`), which then needs a guard."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = before


@cache
def clean_server() -> ForkServerContext:
    """What starts processes: its server is begun here, and must not look for modules in the current folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONSAFEPATH")
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before
    return context


# ------------------------------------------------------------------ in the process


def _serve(connection: Connection, source: Source) -> None:
    """Answers calls until the other side hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    bench = Bench(source)
    with suppress(EOFError, OSError):
        while True:
            name, arguments = connection.recv()
            connection.send(_answer(bench, name, arguments))


def _answer(bench: Bench, name: str, arguments: tuple[Sent, ...]) -> tuple[str, Sent]:
    try:
        return "done", getattr(bench, name)(*arguments)
    except SlimvlmError as error:
        return "refused", error
    except Exception as error:  # whatever a runtime raises: the cell is lost, the others are not
        status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
        return status, f"{type(error).__name__}: {one_line(error)}"
