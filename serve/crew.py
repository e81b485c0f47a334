"""The server's end of its processes: starts them, hears them in its event loop, and starts them again."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Protocol

from hart_runtime.serve.messages import Order, Report

LONGEST_PAUSE = 30.0
"""Seconds before a worker that keeps dying is started again, at the most."""


@contextlib.contextmanager
def until_the_end() -> Iterator[None]:
    """What a process does until its server has gone, or ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the server says when to end
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        yield


class Listener(Protocol):
    """Who hears of a worker; always in the event loop."""

    def heard(self, worker: Worker, report: Report) -> None:
        """A report came."""

    def died(self, worker: Worker) -> None:
        """It is gone, and everything that it was drawing."""


class Worker:
    """A process that works, and is replaced when it dies."""

    def __init__(
        self, work: Callable[[Connection], None], listener: Listener, loop: asyncio.AbstractEventLoop
    ) -> None:
        """``work``: what the process does, until its end of the pipe is closed."""
        self.work, self.listener, self.loop = work, listener, loop
        self.ready = False
        self.deaths = 0
        """Since it was ready for the last time."""
        self.restarts = 0
        self._ended = False
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process; it tells when it is ready."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self.work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        threading.Thread(target=self._hear, args=(self._pipe,), daemon=True).start()

    def send(self, order: Order) -> None:
        """Tell it something; one that died is told of by its listener."""
        assert self._pipe is not None
        with contextlib.suppress(OSError):
            self._pipe.send(order)

    def kill(self) -> None:
        """End it at once; it is started again."""
        if self._process is not None:
            self._process.kill()

    def end(self) -> None:
        """End it for good."""
        self._ended = True
        self.ready = False
        self.kill()

    def _hear(self, pipe: Connection) -> None:
        """In a thread of its own: receiving waits, also for the rest of a large picture."""
        while True:
            try:
                report = pipe.recv()
            except (EOFError, OSError):
                break
            self._call(self._heard, report)
        self._call(self._died, pipe)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            self.loop.call_soon_threadsafe(function, *args)

    def _heard(self, report: Report) -> None:
        if not self._ended:
            self.listener.heard(self, report)

    def _died(self, pipe: Connection) -> None:
        pipe.close()
        if self._process is not None:
            self._process.kill()  # it may have closed its pipe alone
            self._process.join()
        if self._ended:
            return
        self.ready = False
        self.deaths += 1
        self.restarts += 1
        self.listener.died(self)
        pause = 0.0 if self.deaths == 1 else min(2.0 ** (self.deaths - 2), LONGEST_PAUSE)
        self.loop.call_later(pause, self._again)

    def _again(self) -> None:
        if not self._ended:
            self.start()
