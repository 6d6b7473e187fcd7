"""Whether the other processes are still there, noticed at once and not when they are next waited for.

Every process holds a connection to the first one. The system closes it when either ends, however that ends, and
notices within half a minute that a host has gone. The first process passes on what it hears.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from torch import distributed

from slimvlm.compress.errors import ProcessLostError, SlimvlmError

KEY = "watch"  # of the store: where the first process listens
PATIENCE = 30.0  # seconds that a process is given to end by itself, once another one has gone
NOTICED = 3.0  # seconds after which it is known that a process has gone, where a connection to it broke
LEFT, TERMINATED, REFUSED, LOST = "left", "terminated", "refused", "lost"  # words; after the last one, who
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, times


class Watch:
    """The connections of this process, and a thread that listens to them.

    Args:
        told: what a process refused, once it has said that it did.
    """

    def __init__(self, store: distributed.Store, me: int, count: int, told: Callable[[], SlimvlmError | None]) -> None:
        self.me, self.count, self.told = me, count, told
        self._word, self._ending = "", False
        self._main: int | None = None  # the thread to interrupt
        self._heard, self._over = threading.Event(), threading.Event()
        self._peers: dict[socket.socket, tuple[int, str]] = {}
        self._listening: socket.socket | None = None
        self._lock = threading.Lock()
        self._connect(store)
        threading.Thread(target=self._listen, name="slimvlm-watch", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether a process is gone."""
        return self._word.startswith(LOST)

    def error(self, wait: float = 0.0) -> SlimvlmError | None:
        """Why this process must end; None: all others are there, or have left, as far as is known after `wait`."""
        if not self._heard.wait(wait):
            return None
        return self._why()

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, the main thread is interrupted by what `error` says; another thread must ask."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR1, self._interrupt)
        self._main = threading.get_ident()
        if self._ending:
            self._raise_in_main()
        try:
            yield
        finally:
            with self._lock:
                self._main = None
            signal.signal(signal.SIGUSR1, signal.SIG_DFL if before is None else before)

    def leave(self, word: str) -> None:
        """Tell the others that this process ends, LEFT, or that it refused: then they end, too."""
        for peer in [*self._peers]:
            self._say(peer, word)

    def close(self) -> None:
        """Watch no more."""
        self._over.set()
        for one in (*self._peers, self._listening):
            if one is not None:
                with suppress(OSError):
                    one.close()

    def _connect(self, store: distributed.Store) -> None:
        if self.me == 0:
            self._listening = socket.create_server(("", 0), backlog=self.count)
            store.set(KEY, f"{self._listening.getsockname()[1]} {socket.gethostname()}")
            return
        port, _, name = store.get(KEY).decode().partition(" ")
        host = os.environ.get("MASTER_ADDR", name)  # a group of the caller's may have met without
        with suppress(OSError):  # unwatched: what is exchanged breaks off all the same, only later
            peer = _kept_alive(socket.create_connection((host, int(port)), timeout=PATIENCE))
            self._say(peer, f"{self.me} {socket.gethostname()}")
            self._peers[peer] = (0, host)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector, suppress(OSError, ValueError, KeyError):  # closed meanwhile
            for watched in (*self._peers, self._listening):
                if watched is not None:
                    selector.register(watched, selectors.EVENT_READ, watched)
            while not self._over.is_set():
                for key, _ in selector.select(timeout=1.0):
                    one: socket.socket = key.data
                    if one is self._listening:
                        peer = self._accept(one)
                        selector.register(peer, selectors.EVENT_READ, peer)
                    elif not self._hear(one):
                        selector.unregister(one)

    def _accept(self, listening: socket.socket) -> socket.socket:
        peer = _kept_alive(listening.accept()[0])
        number, _, host = _read(peer).partition(" ")
        self._peers[peer] = (int(number), host)
        return peer

    def _hear(self, peer: socket.socket) -> bool:
        """What a process says; whether it may say more."""
        number, host = self._peers[peer]
        word = _read(peer) or f"{LOST} {number} on {host}"
        if word == TERMINATED:  # so are the others, as a rule: they may save what they have
            self._word = f"{LOST} {number} on {host}"
            self._heard.set()
        elif word != LEFT:
            self._end(word)
        return False

    def _end(self, word: str) -> None:
        """This process must end, and those that are connected to it."""
        if self._over.is_set() or self._ending:
            return
        self._word, self._ending = word, True
        self._heard.set()
        for peer in [*self._peers]:
            self._say(peer, word)
        self._raise_in_main()
        threading.Thread(target=self._end_anyway, daemon=True).start()

    def _end_anyway(self) -> None:
        """Where the main thread does not come back: it waits for a GPU that waits for another one, or computes on."""
        if not self._over.wait(PATIENCE):
            sys.stderr.write(f"Error: {self._why()}\n")
            sys.stderr.flush()
            os._exit(SlimvlmError.exit_code)

    def _raise_in_main(self) -> None:
        with self._lock:
            if self._main is not None:
                signal.pthread_kill(self._main, signal.SIGUSR1)

    def _interrupt(self, *_: object) -> None:
        if self._ending and self._main is not None:
            self._main = None  # once: what cleans up afterwards is not to be interrupted
            raise self._why()

    def _why(self) -> SlimvlmError:
        word, _, who = self._word.partition(" ")
        refused = self.told() if word == REFUSED else None
        return refused or ProcessLostError(
            f"process {who} has ended before the job was done (killed, crashed, or its host is gone), so this one "
            "ends, too; what was finished is kept: start again with --resume, with as many processes or another number"
        )

    def _say(self, peer: socket.socket, word: str) -> None:
        with suppress(OSError):
            peer.sendall(f"{word}\n".encode())


def _kept_alive(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not everywhere
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _read(peer: socket.socket) -> str:
    """The next line; nothing where the connection has ended."""
    said = b""
    with suppress(OSError):
        while not said.endswith(b"\n") and (byte := peer.recv(1)):
            said += byte
    return said.decode(errors="replace").strip() if said.endswith(b"\n") else ""
