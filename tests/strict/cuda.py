"""Plays ``cuda.bindings.runtime`` on a :class:`tests.strict.device.StrictCuda`.

Every function takes and returns what the real one does: a status, and values. What real CUDA would
let pass, or would answer with wrong bytes, raises :class:`tests.strict.rules.BrokenRule`.
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.strict import cuda_names as names
from tests.strict.cuda_call import gives
from tests.strict.cuda_memory import MemoryCalls
from tests.strict.cuda_names import cudaError_t
from tests.strict.device import Capture, Event, Refused, Stream, Work
from tests.strict.rules import BrokenRule


class CudaRuntime(MemoryCalls):
    """The functions. Their arguments are CUDA's."""

    # Devices and errors

    @gives(1)
    def cudaGetDeviceCount(self) -> int:
        return len(self._cuda.cards)

    @gives()
    def cudaSetDevice(self, device: int) -> None:
        self._card(device)
        self._cuda.here.device = device

    @gives(1)
    def cudaGetDevice(self) -> int:
        return self._cuda.device()

    @gives(1)
    def cudaDeviceGetAttribute(self, attr: names.cudaDeviceAttr, device: int) -> int:
        card = self._card(device)
        values = {"ComputeCapabilityMajor": card.capability[0], "ComputeCapabilityMinor": card.capability[1]}
        values |= {"MultiProcessorCount": card.processors, "Integrated": int(card.integrated)}
        values |= {"PciBusId": card.bus, "PageableMemoryAccess": int(card.integrated)}
        return values.get(attr.name.removeprefix("cudaDevAttr"), 0)

    @gives(1)
    def cudaGetDeviceProperties(self, device: int) -> SimpleNamespace:
        card = self._card(device)
        return SimpleNamespace(
            name=card.name.encode(),
            totalGlobalMem=card.memory,
            major=card.capability[0],
            minor=card.capability[1],
            multiProcessorCount=card.processors,
            integrated=int(card.integrated),
            pciDomainID=0,
            pciBusID=card.bus,
            pciDeviceID=0,
        )

    @gives(1)
    def cudaDeviceGetPCIBusId(self, length: int, device: int) -> bytes:
        text = f"0000:{self._card(device).bus:02X}:00.0\0".encode()[:length]
        return text.ljust(length)  # all of the buffer, which blanks were in

    def cudaDriverGetVersion(self) -> tuple[cudaError_t, int]:
        return cudaError_t.cudaSuccess, self._cuda.driver

    def cudaRuntimeGetVersion(self) -> tuple[cudaError_t, int]:
        return cudaError_t.cudaSuccess, self._cuda.runtime

    def cudaGetLastError(self) -> tuple[cudaError_t]:
        last = self._cuda.sticky or self._cuda.last_error
        self._cuda.last_error = cudaError_t.cudaSuccess
        return (last,)

    def cudaPeekAtLastError(self) -> tuple[cudaError_t]:
        return (self._cuda.sticky or self._cuda.last_error,)

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[cudaError_t, bytes]:
        return cudaError_t.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[cudaError_t, bytes]:
        return cudaError_t.cudaSuccess, error.name.removeprefix("cudaError").encode()

    # Streams

    @gives(1)
    def cudaStreamCreate(self) -> names.cudaStream_t:
        return self._new_stream(blocking=True)

    @gives(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> names.cudaStream_t:
        return self._new_stream(blocking=flags == names.cudaStreamDefault)

    @gives()
    def cudaStreamDestroy(self, stream: Any) -> None:
        gone = self._cuda.stream("cudaStreamDestroy", stream)
        if gone.queue or gone.capture is not None:
            raise BrokenRule(12, "cudaStreamDestroy", "with work in flight")
        del self._cuda.streams[int(stream)]

    @gives()
    def cudaStreamSynchronize(self, stream: Any) -> None:
        on = self._cuda.stream("cudaStreamSynchronize", stream)
        self._usable(on)
        self._cuda.forbidden("cudaStreamSynchronize")
        self._cuda.wait("cudaStreamSynchronize", on)

    @gives()
    def cudaStreamQuery(self, stream: Any) -> None:
        on = self._cuda.stream("cudaStreamQuery", stream)
        self._usable(on)
        if on.capture is not None:
            on.capture.invalid = True
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)
        if on.queue:
            self._cuda.not_ready("cudaStreamQuery")

    @gives()
    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        on, awaited = self._cuda.stream("cudaStreamWaitEvent", stream), self._event(event)
        self._usable(on)
        if awaited.capture is not None:
            if on.capture is None:
                on.capture = awaited.capture
                awaited.capture.unjoined.add(on)
            elif on is on.capture.origin and awaited.stream is not None:
                on.capture.unjoined.discard(awaited.stream)
            return
        if on.capture is not None:
            on.capture.invalid = True
            raise Refused(cudaError_t.cudaErrorStreamCaptureIsolation)
        if awaited.stream is not None:
            other, number = awaited.stream, awaited.number
            run = functools.partial(self._cuda.run, other, number)
            self._cuda.put(on, Work("cudaStreamWaitEvent", lambda: run, holds=(awaited,)))
            for reached, at in {**awaited.after, other: number}.items():
                on.after[reached] = max(on.after.get(reached, 0), at)

    @gives()
    def cudaStreamBeginCapture(self, stream: Any, mode: names.cudaStreamCaptureMode) -> None:
        on = self._cuda.stream("cudaStreamBeginCapture", stream)
        self._usable(on)
        if on.capture is not None:
            raise Refused(cudaError_t.cudaErrorIllegalState)
        on.capture = Capture(on, mode.value, threading.get_ident())

    @gives(1)
    def cudaStreamEndCapture(self, stream: Any) -> names.cudaGraph_t:
        on = self._cuda.stream("cudaStreamEndCapture", stream)
        capture = on.capture
        if capture is None:
            raise Refused(cudaError_t.cudaErrorIllegalState)
        if on is not capture.origin:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnmatched)
        if capture.mode != 2 and capture.thread != threading.get_ident():
            raise Refused(cudaError_t.cudaErrorStreamCaptureWrongThread)
        for captured in self._cuda.streams.values():
            if captured.capture is capture:
                captured.capture = None
        if capture.invalid:
            raise Refused(cudaError_t.cudaErrorStreamCaptureInvalidated)
        if capture.unjoined:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnjoined)
        made = names.cudaGraph_t()
        self._cuda.graphs[int(made)] = capture.works
        return made

    @gives(1)
    def cudaStreamIsCapturing(self, stream: Any) -> names.cudaStreamCaptureStatus:
        capture = self._cuda.stream("cudaStreamIsCapturing", stream).capture
        return names.cudaStreamCaptureStatus(0 if capture is None else 1 + capture.invalid)

    # Events

    @gives(1)
    def cudaEventCreate(self) -> names.cudaEvent_t:
        return self._new_event(0)

    @gives(1)
    def cudaEventCreateWithFlags(self, flags: int) -> names.cudaEvent_t:
        return self._new_event(flags)

    @gives()
    def cudaEventDestroy(self, event: Any) -> None:
        if self._cuda.in_flight(self._event(event)):
            raise BrokenRule(12, "cudaEventDestroy", "while a stream waits for the event")
        del self._cuda.events[int(event)]

    @gives()
    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        on, recorded = self._cuda.stream("cudaEventRecord", stream), self._event(event)
        self._usable(on)
        if on.capture is not None:
            recorded.stream, recorded.number, recorded.capture = on, on.done, on.capture
            return

        def run() -> None:
            if recorded.stream is on and recorded.number == number:
                recorded.time = time.perf_counter()

        self._cuda.put(on, Work("cudaEventRecord", lambda: run))
        number = on.asked
        recorded.stream, recorded.number, recorded.after = on, number, dict(on.after)
        recorded.capture, recorded.time = None, None

    @gives()
    def cudaEventSynchronize(self, event: Any) -> None:
        awaited = self._event(event)
        self._cuda.forbidden("cudaEventSynchronize")
        if awaited.capture is not None:
            raise Refused(cudaError_t.cudaErrorCapturedEvent)
        if awaited.stream is not None:
            self._usable(awaited.stream)
            self._cuda.wait("cudaEventSynchronize", awaited.stream, awaited.number)

    @gives()
    def cudaEventQuery(self, event: Any) -> None:
        asked = self._event(event)
        if asked.capture is not None:
            asked.capture.invalid = True
            raise Refused(cudaError_t.cudaErrorCapturedEvent)
        if not asked.finished:
            self._cuda.not_ready("cudaEventQuery")

    @gives(1)
    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:
        both = [self._event(start), self._event(end)]
        if any(event.stream is None or not event.timed for event in both):
            raise Refused(cudaError_t.cudaErrorInvalidResourceHandle)
        first, second = (event.time if event.finished else None for event in both)
        if first is None or second is None:
            raise Refused(cudaError_t.cudaErrorNotReady)
        return (second - first) * 1000

    @gives()
    def cudaDeviceSynchronize(self) -> None:
        self._cuda.forbidden("cudaDeviceSynchronize")
        self._cuda.waited("cudaDeviceSynchronize")
        for stream in [*self._cuda.streams.values()]:
            self._cuda.run(stream, stream.asked)

    # Graphs

    @gives(1)
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> names.cudaGraphExec_t:
        works = self._graph("cudaGraphInstantiate", graph)
        made = names.cudaGraphExec_t()
        self._cuda.launchable[int(made)] = [*works]
        return made

    @gives()
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:
        works = self._cuda.launchable.get(int(graphExec))
        if works is None:
            raise BrokenRule(14, "cudaGraphLaunch", "of a graph that was destroyed")
        on = self._cuda.stream("cudaGraphLaunch", stream)
        for span in (span for work in works for span in work.spans):
            span.check(f"a replay of {works[0].call}")

        def prepare() -> Callable[[], None]:
            runs = [work.prepare() for work in works]
            return lambda: _all(runs)

        self._cuda.put(
            on,
            Work(
                "cudaGraphLaunch",
                prepare,
                reads=tuple(span for work in works for span in work.reads),
                writes=tuple(span for work in works for span in work.writes),
                alone=tuple(thing for work in works for thing in work.alone),
                holds=(int(graphExec),),
            ),
        )
        self._cuda.counts.launches += 1

    @gives()
    def cudaGraphDestroy(self, graph: Any) -> None:
        self._graph("cudaGraphDestroy", graph)
        del self._cuda.graphs[int(graph)]

    @gives()
    def cudaGraphExecDestroy(self, graphExec: Any) -> None:
        if int(graphExec) not in self._cuda.launchable:
            raise BrokenRule(14, "cudaGraphExecDestroy", "of a graph that was destroyed before")
        if self._cuda.in_flight(int(graphExec)):
            raise BrokenRule(14, "cudaGraphExecDestroy", "while a launch of it is in flight")
        del self._cuda.launchable[int(graphExec)]

    # What several of them need

    def _card(self, device: int) -> Any:
        if not 0 <= device < len(self._cuda.cards):
            raise Refused(cudaError_t.cudaErrorInvalidDevice)
        return self._cuda.cards[device]

    def _usable(self, stream: Stream) -> None:
        if stream.capture is not None and stream.capture.invalid:
            raise Refused(cudaError_t.cudaErrorStreamCaptureInvalidated)

    def _new_stream(self, blocking: bool) -> names.cudaStream_t:
        made = names.cudaStream_t()
        self._cuda.streams[int(made)] = Stream(made, self._cuda.device(), blocking)
        return made

    def _new_event(self, flags: int) -> names.cudaEvent_t:
        made = names.cudaEvent_t()
        self._cuda.events[int(made)] = Event(timed=not flags & names.cudaEventDisableTiming)
        return made

    def _event(self, handle: Any) -> Event:
        if int(handle) not in self._cuda.events:
            caller = inspect.stack(0)[1].function
            raise BrokenRule(12, caller, f"{handle} is no event, or was destroyed")
        return self._cuda.events[int(handle)]

    def _graph(self, call: str, handle: Any) -> list[Work]:
        if int(handle) not in self._cuda.graphs:
            raise BrokenRule(12, call, f"{handle} is no graph, or was destroyed")
        return self._cuda.graphs[int(handle)]


def _all(runs: list[Callable[[], None]]) -> None:
    for run in runs:
        run()
