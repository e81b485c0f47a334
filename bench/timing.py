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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hart_runtime.runtime.backends.backend import Backend, Outputs, Values, Watched
from hart_runtime.runtime.program import Run

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
class Span:
    """One graph run, or what the host did between two of them."""

    run: Run | None
    seconds: float


@dataclass(frozen=True)
class Trace:
    """Everything one piece of work did, in order."""

    spans: list[Span]
    """Host time first and last."""
    wall: float
    """Seconds on the host's clock; the spans add up to it."""


@dataclass(frozen=True)
class Stage:
    """Time of one stage of one picture, in seconds."""

    inside: float
    """In its graphs."""
    host: float
    """On the host, just before each of its graphs."""


class TimedBackend(Watched):
    """A backend that notes when its graph runs began and ended."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend, self._timed)
        self._events = backend if isinstance(backend, Events) else None
        self._marks: list[tuple[Run | None, Any]] = []

    def _timed(self, run: Run, inputs: Values, proceed: Callable[[Values], Outputs]) -> Outputs:
        self._mark(None)
        outputs = proceed(inputs)
        if self._events is None and self.device not in SYNCHRONOUS:
            for output in outputs.values():  # a stream is in order: one output stands for all
                self.backend.to_host(output)
                break
        self._mark(run)
        return outputs

    def trace(self, work: Callable[[], object]) -> Trace:
        """Do ``work`` with this backend and return what its time went into."""
        self._marks = []
        began = time.perf_counter()
        self._mark(None)
        work()
        self._mark(None)
        wall = time.perf_counter() - began
        marks = self._marks
        between = self._events.seconds_between if self._events else _difference
        spans = [Span(run, between(start, end)) for (_, start), (run, end) in itertools.pairwise(marks)]
        return Trace(spans, wall)

    def _mark(self, run: Run | None) -> None:
        """End the span that began at the last mark, and say what it was."""
        now = self._events.event() if self._events else time.perf_counter()
        self._marks.append((run, now))


def _difference(first: float, second: float) -> float:
    return second - first


def by_stage(spans: list[Span]) -> dict[str, Stage]:
    """Sum a trace by stage; what the host does after the last graph is the stage "host"."""
    stages: dict[str, Stage] = {}
    waiting = 0.0
    for span in spans:
        if span.run is None:
            waiting += span.seconds
            continue
        before = stages.get(span.run.stage, Stage(0.0, 0.0))
        stages[span.run.stage] = Stage(before.inside + span.seconds, before.host + waiting)
        waiting = 0.0
    stages[HOST] = Stage(0.0, waiting)
    return stages


def by_graph(spans: list[Span]) -> dict[str, float]:
    """Seconds per graph, host time included, over the whole picture."""
    totals: dict[str, float] = {}
    for span in spans:
        name = span.run.graph if span.run else HOST
        totals[name] = totals.get(name, 0.0) + span.seconds
    return totals
