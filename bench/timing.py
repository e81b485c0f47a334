"""Times every graph run and everything between two of them; nothing is left out.

A picture is cut at marks, one before and one after each graph run: their distances are, in turn,
host time, graph time, host time, ... and add up to the wall time. A backend that computes on a
stream of its own can place the marks there (:class:`Events`); the host then never waits for a
measurement, and "host time" is the time in which the device had nothing to do. Other
asynchronous backends are waited for after every run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backend import Backend, Tensor, Value
from hart_runtime.runtime.contract import stages_of

HOST = "host"
SYNCHRONOUS = ("cpu",)
"""Devices on which a graph run is over when it returns."""


@runtime_checkable
class Events(Protocol):
    """What a backend offers that can time its own stream."""

    def event(self) -> Any:
        """Place a mark behind everything that was submitted so far."""

    def seconds_between(self, first: Any, second: Any) -> float:
        """Wait for both marks; the time the device took from one to the other."""


@dataclass(frozen=True)
class Call:
    """One graph run, or what the host did (``graph`` is "host") between two of them."""

    graph: str
    seconds: float


@dataclass(frozen=True)
class Trace:
    """Everything one piece of work did, in order."""

    calls: list[Call]
    """Host time first and last."""
    wall: float
    """Seconds on the host's clock; the calls add up to it."""


@dataclass(frozen=True)
class Stage:
    """Time of one stage of one picture, in seconds."""

    inside: float
    """In its graphs."""
    host: float
    """On the host, just before each of its graphs."""


class TimedBackend:
    """A backend that notes when its graph runs began and ended."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name, self.device = backend.name, backend.device
        self._events = backend if isinstance(backend, Events) else None
        self._marks: list[tuple[str, Any]] = []

    def run(self, graph: str, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        self._mark(HOST)
        outputs = self.backend.run(graph, inputs)
        if self._events is None and self.device not in SYNCHRONOUS:
            for output in outputs.values():  # a stream is in order: one output stands for all
                self.backend.to_host(output)
                break
        self._mark(graph)
        return outputs

    def prepare(self, batch: int, settings: SamplingSettings) -> None:
        self.backend.prepare(batch, settings)

    def split(self, value: Tensor) -> list[Tensor]:
        return self.backend.split(value)

    def to_host(self, value: Value) -> NDArray[Any]:
        return self.backend.to_host(value)

    def trace(self, work: Callable[[], object]) -> Trace:
        """Do ``work`` with this backend and return what its time went into."""
        self._marks = []
        began = time.perf_counter()
        self._mark(HOST)
        work()
        self._mark(HOST)
        wall = time.perf_counter() - began
        marks = self._marks
        between = self._events.seconds_between if self._events else _difference
        calls = [Call(name, between(start, end)) for (_, start), (name, end) in itertools.pairwise(marks)]
        return Trace(calls, wall)

    def _mark(self, name: str) -> None:
        """End the span that began at the last mark, and say what it was."""
        now = self._events.event() if self._events else time.perf_counter()
        self._marks.append((name, now))


def _difference(first: float, second: float) -> float:
    return second - first


def by_stage(calls: list[Call]) -> dict[str, Stage]:
    """Sum a trace by stage; what the host does after the last graph is the stage "host"."""
    runs = [call.graph for call in calls if call.graph != HOST]
    names = iter(stages_of(runs))
    stages: dict[str, Stage] = {}
    waiting = 0.0
    for call in calls:
        if call.graph == HOST:
            waiting += call.seconds
            continue
        name = next(names)
        before = stages.get(name, Stage(0.0, 0.0))
        stages[name] = Stage(before.inside + call.seconds, before.host + waiting)
        waiting = 0.0
    stages[HOST] = Stage(0.0, waiting)
    return stages


def by_graph(calls: list[Call]) -> dict[str, float]:
    """Seconds per graph, host time included, over the whole picture."""
    totals: dict[str, float] = {}
    for call in calls:
        totals[call.graph] = totals.get(call.graph, 0.0) + call.seconds
    return totals
