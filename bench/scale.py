"""A service of any size, simulated event by event from the times that one machine was measured with.

Requests for a picture come, wait in one queue, and are drawn in batches by workers, as in
:mod:`hart_runtime.serve.scheduler`: a free worker takes what has waited longest, up to the largest batch, and
after a batch waits a moment for those who ask again. Workers fail and are started again, more of them are
started while many wait, and some are ended while few do.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import simpy

GATHERING, MOST_GATHERING = 0.05, 0.2
"""Of :mod:`hart_runtime.serve.scheduler`: share of a batch's time, and seconds at the most."""
LOOK = 10.0
"""Seconds between two looks of the autoscaler, as of Ray Serve."""


class Times:
    """Seconds that a batch takes: as measured for some sizes, on a line between them and beyond."""

    def __init__(self, measured: Mapping[int, Sequence[float]]) -> None:
        self.medians = {batch: float(np.median(values)) for batch, values in sorted(measured.items())}
        self.spread = [value / self.medians[batch] for batch, values in measured.items() for value in values]
        """Every measurement over the median of its size."""

    def median(self, batch: int) -> float:
        sizes = list(self.medians)
        if batch <= sizes[0] or len(sizes) == 1:
            return self.medians[sizes[0]] * (batch / sizes[0] if batch > sizes[0] else 1)
        low, high = next((a, b) for a, b in pairwise(sizes) if batch <= b or b == sizes[-1])
        slope = (self.medians[high] - self.medians[low]) / (high - low)
        return self.medians[low] + slope * (batch - low)

    def __call__(self, batch: int, chance: random.Random) -> float:
        return self.median(batch) * chance.choice(self.spread)


@dataclass(frozen=True)
class Service:
    """What is simulated."""

    rate: float
    """Requests a second."""
    workers: int
    """At the beginning, and at the least."""
    most_workers: int = 0
    """That an autoscaler may start; none beyond ``workers`` if 0."""
    batch: int = 8
    """Pictures that a worker draws at once, at the most."""
    room: int = 64
    """Requests that may wait; more are refused."""
    steady: bool = False
    """Requests come in equal steps, and not by chance."""
    seconds: float = 600.0
    warm_up: float = 60.0
    """Of these seconds, those at the beginning that nothing is told of."""
    cold: float = 30.0
    """Seconds until a worker that is started can draw."""
    between_failures: float = math.inf
    """Hours that a worker runs without one, in the mean."""
    wanted: float = 2.0
    """Requests a worker, waiting or drawn, that the autoscaler aims at."""
    patience_up: float = 30.0
    patience_down: float = 600.0
    """Seconds that it wants more, or fewer, before it acts, as of Ray Serve."""


@dataclass
class Told:
    """What came of it."""

    service: Service
    waited: list[float] = field(default_factory=list)
    """Seconds of each request, from asking to its picture."""
    refused: int = 0
    again: int = 0
    """Requests whose worker failed while it drew them."""
    busy: float = 0.0
    """Seconds that workers drew."""
    there: float = 0.0
    """Seconds that workers were paid for."""

    @property
    def throughput(self) -> float:
        """Pictures a second."""
        return len(self.waited) / (self.service.seconds - self.service.warm_up)

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.waited, share)) if self.waited else math.nan

    def summary(self) -> dict[str, float]:
        """As JSON."""
        return {
            "pictures_per_second": self.throughput,
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "refused": self.refused,
            "again": self.again,
            "busy": self.busy / self.there if self.there else 0.0,
            "mean_workers": self.there / (self.service.seconds - self.service.warm_up),
        }


def simulate(service: Service, times: Callable[[int, random.Random], float], seed: int = 0) -> Told:
    """Run it once."""
    simulation = _Simulation(service, times, seed)
    simulation.clock.run(service.seconds)
    simulation.end()
    return simulation.told


class _Simulation:
    def __init__(self, service: Service, times: Callable[[int, random.Random], float], seed: int) -> None:
        self.service, self.times = service, times
        self.chance = random.Random(seed)
        self.clock = simpy.Environment()
        self.told = Told(service)
        self.queue: deque[float] = deque()
        """When each of those that wait came."""
        self.idle: deque[Any] = deque()
        """Events of workers that wait for work."""
        self.gathering: list[Any] = []
        """The same of workers that wait for more of it."""
        self.drawing = 0
        self.wanted = service.workers
        self.running = 0
        self._counted_until = service.warm_up
        self.clock.process(self._arrivals())
        for _ in range(service.workers):
            self.clock.process(self._worker(cold=False))
        if service.most_workers > service.workers:
            self.clock.process(self._autoscaler())

    def end(self) -> None:
        self._count(0)

    @property
    def counted(self) -> bool:
        return self.clock.now >= self.service.warm_up

    def _arrivals(self) -> Generator[Any, Any, None]:
        service = self.service
        while True:
            step = 1 / service.rate if service.steady else self.chance.expovariate(service.rate)
            yield self.clock.timeout(step)
            if len(self.queue) >= service.room:
                self.told.refused += self.counted
                continue
            self.queue.append(self.clock.now)
            if self.idle:
                self.idle.popleft().succeed()
            while self.gathering:
                self.gathering.pop().succeed()

    def _worker(self, cold: bool) -> Generator[Any, Any, None]:
        service, clock = self.service, self.clock
        self._count(1)
        if cold:
            yield clock.timeout(service.cold)
        fails = clock.now + self._life()
        while self.running <= self.wanted:
            if not self.queue:
                event = clock.event()
                self.idle.append(event)
                yield event
                continue  # somebody else may have been faster
            taken = [self.queue.popleft() for _ in range(min(service.batch, len(self.queue)))]
            self.drawing += len(taken)
            seconds = self.times(len(taken), self.chance)
            if clock.now + seconds > fails:
                yield clock.timeout(max(fails - clock.now, 0))
                self.queue.extendleft(reversed(taken))
                self.drawing -= len(taken)
                self.told.again += len(taken) * self.counted
                yield clock.timeout(service.cold)
                fails = clock.now + self._life()
                continue
            yield clock.timeout(seconds)
            self.drawing -= len(taken)
            if self.counted:
                self.told.waited += [clock.now - came for came in taken]
                self.told.busy += seconds
            yield from self._gather(len(taken) + len(self.queue), min(seconds * GATHERING, MOST_GATHERING))
        self._count(-1)

    def _gather(self, pictures: int, seconds: float) -> Generator[Any, Any, None]:
        """Wait until so many are there or a batch is full, and no longer than that."""
        pictures = min(pictures, self.service.batch)
        late = self.clock.timeout(seconds)
        while len(self.queue) < pictures and not late.processed:
            self.gathering.append(self.clock.event())
            yield self.clock.any_of([self.gathering[-1], late])

    def _life(self) -> float:
        """Seconds until a worker fails."""
        hours = self.service.between_failures
        return self.chance.expovariate(1 / (hours * 3600)) if math.isfinite(hours) else math.inf

    def _count(self, change: int) -> None:
        """Workers that there are from now on; those that there were are paid for until now."""
        now = max(self.clock.now, self.service.warm_up)
        self.told.there += self.running * (now - self._counted_until)
        self._counted_until = now
        self.running += change

    def _autoscaler(self) -> Generator[Any, Any, None]:
        service = self.service
        up = down = 0.0
        while True:
            yield self.clock.timeout(LOOK)
            asked = math.ceil((len(self.queue) + self.drawing) / service.wanted)
            asked = min(max(asked, service.workers), service.most_workers)
            up = up + LOOK if asked > self.wanted else 0.0
            down = down + LOOK if asked < self.wanted else 0.0
            if up >= service.patience_up or down >= service.patience_down:
                for _ in range(asked - self.wanted):
                    self.clock.process(self._worker(cold=True))
                self.wanted = asked
                up = down = 0.0
                while self.idle:  # to see whether they are one too many
                    self.idle.popleft().succeed()
