"""Who is drawn when: requests wait in one queue, and pictures that are alike are drawn together.

Everything here happens in the event loop; workers are processes that draw one batch at a time. Pictures do
not depend on their batch, so nobody can tell with whom he was drawn.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from hart_runtime.serve import errors
from hart_runtime.serve.crew import Worker
from hart_runtime.serve.errors import Refusal
from hart_runtime.serve.messages import Draw, Drawn, Failed, Finished, Job, Leave, Ready, Report, Shown
from hart_runtime.serve.metrics import Metrics
from hart_runtime.serve.order import Alike, Batch, Complete, Order, Partial, Picture
from hart_runtime.serve.requests import Asked
from hart_runtime.serve.screening import Screener
from hart_runtime.serve.worker import Plan, work

log = logging.getLogger(__name__)

GATHERING, MOST_GATHERING = 0.05, 0.2
"""Share of a batch's time, and seconds at the most, that a worker waits after it for clients who were just
answered and ask again, until all of them and who waited already are there; else one who came late is drawn
alone, and the others while he is away, in turns."""
MOST_FAILURES = 3
"""Batches in a row that fail before the worker is taken for broken."""


class Scheduler:
    """The queue, and the workers that empty it."""

    def __init__(
        self,
        plans: Iterable[Plan],
        metrics: Metrics,
        room: int,
        patience: float,
        safety_model: str | None = None,
    ) -> None:
        """Belongs to the event loop that is running.

        Args:
            plans: one for each worker.
            room: pictures that may wait.
            patience: seconds until a request is given up.
            safety_model: that prompts are shown to first, see :class:`hart_runtime.hart.safety.SafetyModel`.
        """
        self.loop = asyncio.get_running_loop()
        self.metrics, self.room, self.patience = metrics, room, patience
        self.waiting: deque[Picture] = deque()
        self.workers = [Worker(partial(work, plan), self, self.loop) for plan in plans]
        self.drawing: dict[Worker, Batch] = {}
        """What each busy worker draws."""
        self.batches: dict[int, tuple[Worker, Batch]] = {}
        """Those of which pictures are still to come, by number."""
        self.orders: set[Order] = set()
        self.stopping = False
        self.broken: asyncio.Future[Failed] = self.loop.create_future()
        """Done when a worker or the safety model cannot begin."""
        self.screener: Screener | None = None
        if safety_model is not None:
            self.screener = Screener(safety_model, metrics, room, patience, self.broken)
        self._screened = 0
        """Requests whose prompt is being screened."""
        self.seconds = 1.0
        """That a picture takes, of those drawn lately."""
        self._numbers = itertools.count()
        self._failures: dict[Worker, int] = {}
        self._gathering: dict[Worker, int] = {}
        """Workers that wait for clients who come back, and for how many pictures."""

    def start(self) -> None:
        for worker in self.workers:
            worker.start()
        if self.screener is not None:
            self.screener.worker.start()

    @property
    def ready(self) -> bool:
        """Whether somebody draws, and takes requests."""
        screened = self.screener is None or self.screener.worker.ready
        return not self.stopping and screened and any(worker.ready for worker in self.workers)

    async def submit(self, asked: Asked, name: str) -> Order:
        """Take a request in.

        Raises:
            Refusal: there is no room, the server ends, or its prompt is not to be drawn.
        """
        if self.stopping:
            raise errors.stopping()
        if self.screener is not None and asked.model.classes is None:
            self._screened += 1
            try:
                await self.screener.check(asked.prompt)
            finally:
                self._screened -= 1
        if len(self.waiting) + asked.n > self.room:
            raise errors.busy(f"{len(self.waiting)} pictures", self.wait())
        order = Order(asked, name)
        order.deadline = self.loop.call_later(self.patience, self._expire, order)
        size, edited = asked.model.manifest.model.image_size, asked.source is not None
        alike = Alike(asked.model.name, size, asked.settings, frozenset(asked.scales), edited)
        for index, seed in enumerate(asked.seeds):
            job = Job(asked.prompt, seed, asked.final, asked.partial, asked.source)
            self.waiting.append(Picture(order, index, job, alike))
        self.orders.add(order)
        self._dispatch()
        return order

    def wait(self) -> float:
        """Seconds until there is room, as far as can be told from what was drawn lately."""
        ahead = len(self.waiting) + sum(len(batch.pictures) for batch in self.drawing.values())
        drawing = max(sum(worker.ready for worker in self.workers), 1)
        return ahead * self.seconds / drawing

    def leave(self, order: Order) -> None:
        """Nobody waits for it any more; may be said at any time, and again."""
        if order.deadline is not None:
            order.deadline.cancel()
        self.orders.discard(order)
        order.open.clear()
        self.waiting = deque(picture for picture in self.waiting if picture.order is not order)
        for worker, batch in list(self.batches.values()):
            for row in [row for row in batch.open if batch.pictures[row].order is order]:
                self._close(batch, row)
                if self.drawing.get(worker) is batch:
                    worker.send(Leave(batch.number, row))
        self._measure()

    def refuse(self, order: Order, refusal: Refusal) -> None:
        """End an order without its pictures."""
        if not order.over:
            order.tell(refusal)
        self.leave(order)

    async def drained(self) -> None:
        """Wait until every order has its pictures."""
        while self.orders or self._screened:
            await asyncio.sleep(0.02)

    def end(self) -> None:
        """End the workers; who still waits is told so."""
        self.stopping = True
        for order in list(self.orders):
            self.refuse(order, errors.stopping())
        for worker in self.workers:
            worker.end()
        if self.screener is not None:
            self.screener.end()

    # What workers report.

    def heard(self, worker: Worker, report: Report) -> None:
        if isinstance(report, Ready):
            worker.ready, worker.deaths = True, 0
        elif isinstance(report, Failed) and report.number is None:
            if not self.broken.done():
                self.broken.set_result(report)
        elif isinstance(report, Shown):
            self._shown(report)
        elif isinstance(report, Finished):
            self._finished(report)
        elif isinstance(report, Drawn):
            self._drawn(worker, self.drawing.pop(worker), report)
        elif isinstance(report, Failed):
            self._failed(worker, self.drawing.pop(worker), report)
        self._dispatch()

    def died(self, worker: Worker) -> None:
        log.error("a worker died and is started again", extra={"restarts": worker.restarts})
        self.metrics.restarts.inc()
        self.drawing.pop(worker, None)
        self._failures.pop(worker, None)
        for owner, batch in list(self.batches.values()):
            if owner is worker:
                for order in {batch.pictures[row].order for row in batch.open}:
                    self.refuse(order, errors.failed())

    def _shown(self, report: Shown) -> None:
        for batch, picture in self._open(report.number, report.row):
            order = picture.order
            number = sorted(batch.pictures[report.row].alike.scales).index(report.scale)
            order.tell(Partial(picture.index, number, report.scale, report.data))

    def _finished(self, report: Finished) -> None:
        for batch, picture in self._open(report.number, report.row):
            order = picture.order
            order.tell(Complete(picture.index, report.data, report.tokens, report.read))
            order.open.discard(picture.index)
            self.metrics.pictures.inc()
            self._close(batch, report.row)
            if order.over:
                self.leave(order)

    def _drawn(self, worker: Worker, batch: Batch, report: Drawn) -> None:
        self._failures[worker] = 0
        if report.stopped:
            self.metrics.stopped.inc()
            return
        taken = self.loop.time() - batch.began
        self.seconds += (taken / len(batch.pictures) - self.seconds) / 4
        self.metrics.drawn(len(batch.pictures), report.seconds or {}, report.encoded)
        self._gathering[worker] = len(batch.pictures) + len(self.waiting)
        self.loop.call_later(min(taken * GATHERING, MOST_GATHERING), self._gathered, worker)

    def _failed(self, worker: Worker, batch: Batch, report: Failed) -> None:
        """One picture may have failed all of its batch, so each is drawn again by itself."""
        log.error("a batch failed: %s", report.message, extra={"pictures": len(batch.pictures)})
        del self.batches[batch.number]
        open_pictures = [batch.pictures[row] for row in sorted(batch.open)]
        if len(batch.pictures) > 1:
            for picture in reversed(open_pictures):
                picture.alike = replace(picture.alike, alone=next(self._numbers))
                self.waiting.appendleft(picture)
            return
        refusal = errors.failed(again=False)  # its seed would bring it to the same place
        if report.bad_input:
            refusal = Refusal(400, report.message, code="invalid_value")
        for picture in open_pictures:
            self.refuse(picture.order, refusal)
        self._failures[worker] = 0 if report.bad_input else self._failures.get(worker, 0) + 1
        if self._failures[worker] >= MOST_FAILURES:
            worker.ready = False
            worker.kill()

    # The queue.

    def _expire(self, order: Order) -> None:
        self.refuse(order, errors.too_late(self.patience))

    def _gathered(self, worker: Worker) -> None:
        self._gathering.pop(worker, None)
        self._dispatch()

    def _open(self, number: int, row: int) -> Iterable[tuple[Batch, Picture]]:
        """A picture of a batch, if somebody still waits for it."""
        _, batch = self.batches.get(number, (None, None))
        if batch is not None and row in batch.open:
            yield batch, batch.pictures[row]

    def _close(self, batch: Batch, row: int) -> None:
        batch.open.discard(row)
        if not batch.open:
            self.batches.pop(batch.number, None)

    def _dispatch(self) -> None:
        """Give the workers that have nothing to do what has waited longest, and what is like it."""
        for worker in self.workers:
            if not self.waiting or not worker.ready or worker in self.drawing:
                continue
            most = self.waiting[0].order.asked.model.manifest.max_batch
            if len(self.waiting) >= min(most, self._gathering.get(worker, 0)):
                self._give(worker)
        self._measure()

    def _give(self, worker: Worker) -> None:
        first = self.waiting[0]
        model = first.order.asked.model
        alike = (picture for picture in self.waiting if picture.alike == first.alike)
        pictures = list(itertools.islice(alike, model.manifest.max_batch))
        taken = set(map(id, pictures))
        self.waiting = deque(picture for picture in self.waiting if id(picture) not in taken)
        batch = Batch(next(self._numbers), model, pictures, set(range(len(pictures))), self.loop.time())
        self.drawing[worker], self.batches[batch.number] = batch, (worker, batch)
        jobs = tuple(picture.job for picture in pictures)
        shared = first.alike
        worker.send(Draw(batch.number, model.name, shared.size, jobs, shared.settings, shared.scales))

    def _measure(self) -> None:
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.ready.set(self.ready)
