"""Prompts are shown to a safety model before they are drawn.

The model lives in a process of its own, loaded once: torch is no guest of the one that answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from functools import lru_cache, partial
from multiprocessing.connection import Connection

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.serve import errors
from hart_runtime.serve.crew import Worker, until_the_end
from hart_runtime.serve.messages import Failed, Ready, Report, Screened
from hart_runtime.serve.metrics import Metrics

log = logging.getLogger(__name__)

SAFETY_MODEL = "safety model"
"""The stage, beside those of a drawing."""
MOST_REMEMBERED = 1024
"""Prompts that came lately and are not read again."""


def screen(source: str, pipe: Connection) -> None:
    """Answer prompts that come through a pipe with :class:`Screened`, until it ends."""
    from hart_runtime.hart.safety import THRESHOLD, SafetyModel

    with until_the_end():
        try:
            model = SafetyModel(source)
        except InputError as error:
            pipe.send(Failed(None, str(error), bad_input=True))
            return
        score = lru_cache(MOST_REMEMBERED)(lambda prompt: model([prompt])[0])
        pipe.send(Ready())
        while True:
            prompt, began = pipe.recv(), time.perf_counter()
            try:
                blocked = score(prompt) > THRESHOLD
            except RunError as error:
                pipe.send(Failed(0, str(error)))
            else:
                pipe.send(Screened(blocked, time.perf_counter() - began))


class Screener:
    """Asks the safety model about prompts, one after the other."""

    def __init__(
        self, source: str, metrics: Metrics, room: int, patience: float, broken: asyncio.Future[Failed]
    ) -> None:
        """Belongs to the event loop that is running.

        Args:
            source: as of :class:`hart_runtime.hart.safety.SafetyModel`.
            room: prompts that may wait.
            patience: seconds until a request is given up.
            broken: becomes done when the model cannot be opened.
        """
        self.loop = asyncio.get_running_loop()
        self.metrics, self.room, self.patience = metrics, room, patience
        self.worker = Worker(partial(screen, source), self, self.loop)
        self.broken = broken
        self.waiting: deque[tuple[str, asyncio.Future[bool]]] = deque()
        self.asked: asyncio.Future[bool] | None = None
        """What is being answered; the pipe holds no more than that."""
        self.seconds = 1.0
        """That an answer takes, of those lately."""

    async def check(self, prompt: str) -> None:
        """Raises Refusal: it may not be drawn, or nobody can tell."""
        if len(self.waiting) >= self.room:
            raise errors.busy(f"{len(self.waiting)} prompts", len(self.waiting) * self.seconds)
        answer: asyncio.Future[bool] = self.loop.create_future()
        self.waiting.append((prompt, answer))
        self._ask()
        try:
            blocked = await asyncio.wait_for(answer, self.patience)
        except asyncio.TimeoutError:
            raise errors.too_late(self.patience) from None
        if blocked:
            raise errors.blocked()

    def end(self) -> None:
        """End the process; who still waits is told so."""
        self.worker.end()
        for answer in (self.asked, *(answer for _, answer in self.waiting)):
            if answer is not None and not answer.done():
                answer.set_exception(errors.stopping())

    def heard(self, worker: Worker, report: Report) -> None:
        if isinstance(report, Ready):
            worker.ready, worker.deaths = True, 0
        elif isinstance(report, Screened):
            self.seconds += (report.seconds - self.seconds) / 4
            self.metrics.stages.labels(SAFETY_MODEL).inc(report.seconds)
            answer, self.asked = self.asked, None
            if answer is not None and not answer.done():
                answer.set_result(report.blocked)
        elif isinstance(report, Failed):
            if report.number is None and not self.broken.done():
                self.broken.set_result(report)
            self._failed(report.message)
        self._ask()

    def died(self, worker: Worker) -> None:
        self.metrics.restarts.inc()
        self._failed("its process died and is started again")

    def _failed(self, why: str) -> None:
        """No answer is no permission."""
        log.error("the safety model failed: %s", why)
        answer, self.asked = self.asked, None
        if answer is not None and not answer.done():
            answer.set_exception(errors.failed())

    def _ask(self) -> None:
        while self.asked is None and self.waiting and self.worker.ready:
            prompt, answer = self.waiting.popleft()
            if not answer.done():
                self.asked = answer
                self.worker.send(prompt)
