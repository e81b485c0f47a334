"""A service of any size, simulated event by event from the times that one machine was measured with.

Requests for a picture come to replicas, as those of Ray Serve are: each is one worker with a queue of its
own, and a request goes to that one of two, chosen by chance, which has fewer. A worker that is free takes
what has waited longest, up to the largest batch, and after a batch waits a moment for those who ask again,
as in :mod:`hart_runtime.serve.scheduler`. Workers fail and are started again, more of them are started while
many wait, and some are ended while few do.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
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
    """Requests that may wait for each worker; more are refused."""
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
    """What came of it, simulated or measured."""

    service: Service
    runs: int = 1
    """That are told of together."""
    waited: list[float] = field(default_factory=list)
    """Seconds of each request that was answered after the warm-up, from asking to its picture."""
    refused: int = 0
    again: int = 0
    """Requests whose worker failed while it drew them."""
    busy: float = 0.0
    """Seconds that workers drew."""
    there: float = 0.0
    """Seconds that workers were paid for."""

    @classmethod
    def together(cls, tolds: Iterable[Told]) -> Told:
        """Of several runs of one service."""
        first, *others = tolds
        for told in others:
            first = cls(
                first.service,
                first.runs + told.runs,
                first.waited + told.waited,
                first.refused + told.refused,
                first.again + told.again,
                first.busy + told.busy,
                first.there + told.there,
            )
        return first

    @property
    def seconds(self) -> float:
        """That are told of."""
        return self.runs * (self.service.seconds - self.service.warm_up)

    @property
    def throughput(self) -> float:
        """Pictures a second."""
        return len(self.waited) / self.seconds

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.waited, share)) if self.waited else math.nan

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "pictures_per_second": self.throughput,
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "refused": self.refused,
            "again": self.again,
            "busy": self.busy / self.there if self.there else 0.0,
            "mean_workers": self.there / self.seconds,
        }


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Moments at which requests come by chance (Poisson), in seconds, without an end.

    Args:
        rate: requests a second.
    """
    chance, now = random.Random(f"arrivals {seed}"), 0.0
    while True:
        now += chance.expovariate(rate)
        yield now


def simulate(service: Service, times: Callable[[int, random.Random], float], seed: int = 0) -> Told:
    """Run it once; those who ask come at the moments of :func:`arrivals`."""
    simulation = _Simulation(service, times, seed)
    simulation.clock.run(service.seconds)
    simulation.end()
    return simulation.told


class _Replica:
    """A worker and who asks it."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.queue: deque[float] = deque()
        """When each of those that wait came."""
        self.drawing = 0
        self.ending = False
        self._enough: Any = None
        self._least = 0

    @property
    def ongoing(self) -> int:
        """Requests that it has."""
        return len(self.queue) + self.drawing

    def enough(self, least: int) -> Any:
        """An event: so many wait, or it is to end."""
        self._enough, self._least = self.clock.event(), least
        return self._enough

    def look(self) -> None:
        """Something has changed."""
        event = self._enough
        if event is not None and not event.triggered and (self.ending or len(self.queue) >= self._least):
            event.succeed()


class _Simulation:
    def __init__(self, service: Service, times: Callable[[int, random.Random], float], seed: int) -> None:
        self.service, self.times = service, times
        self.chance = random.Random(seed)
        self.clock = simpy.Environment()
        self.told = Told(service)
        self.wanted: list[_Replica] = []
        """Those that are to be there, the oldest first."""
        self.taking: list[_Replica] = []
        """Those of them that take requests, since they have begun."""
        self.running = 0
        self._counted_until = service.warm_up
        self.clock.process(self._arrivals(seed))
        for _ in range(service.workers):
            self._start(cold=False)
        if service.most_workers > service.workers:
            self.clock.process(self._autoscaler())

    def end(self) -> None:
        self._count(0)

    @property
    def counted(self) -> bool:
        return self.clock.now >= self.service.warm_up

    def _arrivals(self, seed: int) -> Generator[Any, Any, None]:
        for moment in arrivals(self.service.rate, seed):
            yield self.clock.timeout(moment - self.clock.now)
            replica = min(
                self.chance.sample(self.taking, min(2, len(self.taking))), key=lambda one: one.ongoing
            )
            if len(replica.queue) >= self.service.room:
                self.told.refused += self.counted
                continue
            replica.queue.append(self.clock.now)
            replica.look()

    def _start(self, cold: bool) -> None:
        replica = _Replica(self.clock)
        self.wanted.append(replica)
        self.clock.process(self._work(replica, cold))

    def _work(self, replica: _Replica, cold: bool) -> Generator[Any, Any, None]:
        service, clock = self.service, self.clock
        self._count(1)
        if cold:
            yield clock.timeout(service.cold)
        if not replica.ending:
            self.taking.append(replica)
        fails = clock.now + self._life()
        while replica.queue or not replica.ending:
            if not replica.queue:
                yield replica.enough(1)
                continue
            taken = [replica.queue.popleft() for _ in range(min(service.batch, len(replica.queue)))]
            replica.drawing = len(taken)
            seconds = self.times(len(taken), self.chance)
            if clock.now + seconds > fails:
                yield clock.timeout(max(fails - clock.now, 0))
                replica.drawing = 0
                replica.queue.extendleft(reversed(taken))
                self.told.again += len(taken) * self.counted
                yield clock.timeout(service.cold)
                fails = clock.now + self._life()
                continue
            yield clock.timeout(seconds)
            replica.drawing = 0
            if self.counted:
                self.told.waited += [clock.now - came for came in taken]
                self.told.busy += seconds
            back = min(len(taken) + len(replica.queue), service.batch)
            if len(replica.queue) < back:  # wait for those who ask again, until all of them are there
                late = clock.timeout(min(seconds * GATHERING, MOST_GATHERING))
                yield late | replica.enough(back)
        self._count(-1)

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
            asked = math.ceil(sum(replica.ongoing for replica in self.wanted) / service.wanted)
            asked = min(max(asked, service.workers), service.most_workers)
            up = up + LOOK if asked > len(self.wanted) else 0.0
            down = down + LOOK if asked < len(self.wanted) else 0.0
            if up >= service.patience_up or down >= service.patience_down:
                up = down = 0.0
                for _ in range(asked - len(self.wanted)):
                    self._start(cold=True)
                for replica in self.wanted[asked:]:
                    self._end(replica)
                del self.wanted[asked:]

    def _end(self, replica: _Replica) -> None:
        """It draws what it has, and goes."""
        replica.ending = True
        if replica in self.taking:
            self.taking.remove(replica)
        replica.look()
