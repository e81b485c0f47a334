"""Processes that are forked, work through trials and may die of them: only their own trial is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tests.torture.outcomes import Outcome, Trial

Work = Callable[[int], Trial]
FORK = get_context("fork")


class Failed(NamedTuple):
    """What a trial raised that it should have judged: a fault of the campaign."""

    report: str


class Worker:
    """A process, and the trial it is at."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process: BaseProcess = FORK.Process(target=_work, args=(make, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None
        self.deadline = 0.0
        self._limit = 0.0
        self._in_line = 0.0

    def begin(self, number: int, limit: float) -> None:
        self.number, self.deadline = number, time.monotonic() + limit
        self._limit, self._in_line = limit, self._stood_in_line()
        self.pipe.send(number)

    def late(self) -> bool:
        """Whether its time is over; what it stood in line for a core, beside others, is not its own."""
        if time.monotonic() <= self.deadline:
            return False
        more = min((stood := self._stood_in_line()) - self._in_line, self._limit)
        self._in_line, self.deadline = stood, time.monotonic() + more
        return more < 0.01 * self._limit

    def _stood_in_line(self) -> float:
        """Seconds, of the thread that did so longest."""
        found = [0.0]
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # the thread has ended
                found.append(int(file.read_text().split()[1]) / 1e9)
        return max(found)

    def end(self) -> str:
        """Kill it; returns how it had ended before."""
        self.process.join(1 if self.pipe.poll() else 0)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.pipe.close()
        if code is None:
            return "running"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def _work(make: Callable[[], Work], pipe: Connection) -> None:
    try:
        work = make()
        while True:
            pipe.send(work(pipe.recv()))
    except EOFError:
        pass
    except Exception:
        pipe.send(Failed(traceback.format_exc()))
    os._exit(0)  # what libraries do at the end of a process is no part of a trial


def in_workers(
    campaign: str, make: Callable[[], Work], numbers: Iterable[int], workers: int, limit: float
) -> Iterator[Trial]:
    """Every trial as it ends.

    Args:
        make: called in each worker, makes what does a trial.
        limit: seconds after which a trial hangs.
    """
    left = iter(numbers)
    idle = [Worker(make) for _ in range(workers)]
    busy: dict[Connection, Worker] = {}
    try:
        while True:
            while idle and (number := next(left, None)) is not None:
                worker = idle.pop()
                worker.begin(number, limit)
                busy[worker.pipe] = worker
            if not busy:
                break
            first = min(worker.deadline for worker in busy.values())
            ready = wait(list(busy), max(0.0, first - time.monotonic()))
            for pipe in [*busy]:
                worker = busy[pipe]
                if pipe not in ready and not worker.late():
                    continue
                del busy[pipe]
                trial = _result(campaign, worker) if pipe in ready else None
                if trial is not None:
                    idle.append(worker)
                else:
                    said = worker.end()
                    outcome = Outcome.HANG if said == "running" else Outcome.CRASH
                    trial = Trial(campaign, worker.number or 0, outcome, said)
                    idle.append(Worker(make))
                yield trial
    finally:
        for worker in (*idle, *busy.values()):
            worker.end()


def _result(campaign: str, worker: Worker) -> Trial | None:
    try:
        found = worker.pipe.recv()
    except (EOFError, OSError):
        return None
    if isinstance(found, Failed):
        raise AssertionError(f"{campaign} {worker.number}: {found.report}")
    assert isinstance(found, Trial)
    return found
