"""Devices that are played by the host: streams as late as they may be, graphs, and what is counted."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.strict.cuda_names import cudaError_t
from tests.strict.memory import Allocation, Span, allocate, find
from tests.strict.rules import BrokenRule

MOST_AFTER_THE_END = 1000
"""Calls to a lost device after which somebody is taken to loop."""
MOST_QUESTIONS = 10_000
"""How often somebody may ask whether work is done that nobody waits for."""


class Refused(Exception):  # noqa: N818  (an answer)
    """CUDA answers with a status."""

    def __init__(self, status: cudaError_t) -> None:
        super().__init__(status.name)
        self.status = status


@dataclass(frozen=True)
class Card:
    """What a GPU says of itself."""

    name: str = "NVIDIA GeForce RTX 4090"
    capability: tuple[int, int] = (8, 9)
    memory: int = 24 << 30
    """Bytes."""
    processors: int = 128
    integrated: bool = False
    bus: int = 1


ORIN = Card("Orin", (8, 7), memory=8 << 30, processors=8, integrated=True)
"""Of a Jetson with JetPack 6: 8 GB that CPU and GPU share."""


@dataclass(eq=False)
class Work:
    """What was put on a stream."""

    call: str
    prepare: Callable[[], Callable[[], None]]
    """Called when it is asked for, and at each launch of a graph that holds it; what it returns then
    runs when the device gets there."""
    reads: tuple[Span, ...] = ()
    writes: tuple[Span, ...] = ()
    alone: tuple[object, ...] = ()
    """What no two works may use at the same time: contexts, and the scratch of contexts."""
    holds: tuple[object, ...] = ()
    """What has to live until it ran: events that are awaited, graphs that are launched."""

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.reads + self.writes


@dataclass(eq=False)
class Capture:
    """What a stream records instead of running it."""

    origin: Stream
    mode: int
    thread: int
    works: list[Work] = field(default_factory=list)
    invalid: bool = False
    unjoined: set[Stream] = field(default_factory=set)
    """Other streams whose part the first one has not waited for."""


@dataclass(eq=False)
class Stream:
    handle: object
    device: int
    blocking: bool
    queue: deque[tuple[int, Work, Callable[[], None]]] = field(default_factory=deque)
    asked: int = 0
    """Number of the last work that was put on it."""
    done: int = 0
    after: dict[Stream, int] = field(default_factory=dict)
    """Up to where other streams are done before what comes next here."""
    capture: Capture | None = None


@dataclass(eq=False)
class Event:
    timed: bool
    stream: Stream | None = None
    number: int = 0
    after: dict[Stream, int] = field(default_factory=dict)
    capture: Capture | None = None
    time: float | None = None

    @property
    def finished(self) -> bool:
        return self.stream is None or self.stream.done >= self.number


@dataclass
class Counts:
    """What tests look at."""

    uploads: int = 0
    upload_bytes: int = 0
    downloads: int = 0
    download_bytes: int = 0
    launches: int = 0
    """Of graphs."""
    executions: int = 0
    """Of engines and sessions, outside of graphs."""
    recaptures: int = 0
    """Of contexts that capture on their own."""
    waits: Counter[str] = field(default_factory=Counter)
    """By the call that waited."""
    calls: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    """Most bytes that were allocated on one device at once."""


class StrictCuda:
    """Everything behind the calls of :mod:`tests.strict.cuda`, and behind engines and sessions."""

    def __init__(self, cards: Sequence[Card], driver: int = 13000, runtime: int = 13000) -> None:
        self.cards, self.driver, self.runtime = tuple(cards), driver, runtime
        self.counts = Counts()
        self.lock = threading.RLock()
        self.memory: dict[int, Allocation] = {}
        self.pinned: dict[int, Allocation] = {}
        self.reserved: Counter[int] = Counter()
        """Bytes by device that libraries hold for weights and arenas; nothing lies there."""
        self.kept: Counter[int] = Counter()
        """The same of what a library never gives back, such as an arena for all sessions."""
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.launchable: dict[int, list[Work]] = {}
        self.last_error = cudaError_t.cudaSuccess
        self.sticky: cudaError_t | None = None
        self.broken: list[BrokenRule] = []
        self.quiet = False
        self.here = threading.local()
        self._after_the_end = self._questions = 0
        self._failures: dict[str, tuple[int, cudaError_t, bool]] = {}

    # What tests set

    def fail(self, call: str, nth: int, status: cudaError_t, sticky: bool = False) -> None:
        """Let the nth call from now on fail; with ``sticky`` everything after it as well."""
        self._failures[call] = nth, status, sticky

    @contextlib.contextmanager
    def without_waits(self) -> Iterator[None]:
        """Inside, nobody may wait for the device or copy from it."""
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False

    def count_anew(self) -> None:
        """Forget what was counted, as between two pictures."""
        self.counts = Counts(peak=max(map(self.used, range(len(self.cards))), default=0))

    def alive(self) -> dict[str, int]:
        """What was made and not given back, by kind."""
        held = {
            "streams": len(self.streams),
            "events": len(self.events),
            "graphs": len(self.graphs),
            "graph execs": len(self.launchable),
            "allocations": len(self.memory),
            "page-locked buffers": len(self.pinned),
            "reserved bytes": sum(self.reserved.values()),
        }
        return {kind: count for kind, count in held.items() if count}

    def finish(self) -> None:
        """Raises the first rule that was broken, if anybody caught it, or if something was not given back."""
        self.tell()
        if alive := self.alive():
            raise self.note(BrokenRule(12, "the end", f"still alive: {alive}"))

    # What calls, engines and sessions use

    def note(self, broken: BrokenRule) -> BrokenRule:
        """Keep it: whoever catches it hears of it again at the next call."""
        if broken not in self.broken:
            self.broken.append(broken)
        return broken

    def tell(self) -> None:
        if self.broken:
            raise self.broken[0]

    def enter(self, call: str) -> None:
        """At the start of every call that needs a device.

        Raises:
            Refused: the device is lost, or a test wants this call to fail.
        """
        self.tell()
        self.counts.calls[call] += 1
        if self.sticky is not None:
            self._after_the_end += 1
            if self._after_the_end > MOST_AFTER_THE_END:
                raise BrokenRule(15, call, "is called again and again, though the device is lost")
            raise Refused(self.sticky)
        if call in self._failures:
            nth, status, sticky = self._failures[call]
            if nth > 1:
                self._failures[call] = nth - 1, status, sticky
            else:
                del self._failures[call]
                self.sticky = status if sticky else None
                raise Refused(status)
        if self.runtime // 1000 > self.driver // 1000:
            raise Refused(cudaError_t.cudaErrorInsufficientDriver)
        if not self.cards:
            raise Refused(cudaError_t.cudaErrorNoDevice)

    def not_ready(self, call: str) -> None:
        """Answer that work is not done.

        Raises:
            Refused: always, but for who asks for ever.
        """
        self._questions += 1
        if self._questions > MOST_QUESTIONS:
            raise BrokenRule(1, call, "work is done here when somebody waits for it, not when they ask")
        raise Refused(cudaError_t.cudaErrorNotReady)

    def device(self) -> int:
        """Of the thread that asks."""
        return getattr(self.here, "device", 0)

    def used(self, device: int) -> int:
        """Bytes."""
        held = sum(a.nbytes for a in self.memory.values() if a.device == device)
        return held + self.reserved[device] + self.kept[device]

    def take(self, nbytes: int) -> int:
        """Address of new memory of the thread's device."""
        self._room(nbytes, self.device())
        made = allocate(nbytes, self.device())
        self.memory[made.address] = made
        self._peak(made.device)
        return made.address

    def reserve(self, owner: object, nbytes: int, device: int) -> None:
        """Count memory that a library keeps as long as an object lives; without one for good."""
        self._room(nbytes, device)
        if owner is None:
            self.kept[device] += nbytes
        else:
            self.reserved[device] += nbytes
            weakref.finalize(owner, self.reserved.subtract, {device: nbytes}).atexit = False
        self._peak(device)

    def forbidden(self, call: str) -> None:
        """What may not happen while a stream is capturing, and spoils the capture.

        Raises:
            Refused: one is, in this thread, or anywhere in global mode.
        """
        me = threading.get_ident()
        spoiled = [
            stream.capture
            for stream in self.streams.values()
            if stream.capture is not None
            and (stream.capture.mode == 0 or (stream.capture.mode == 1 and stream.capture.thread == me))
        ]
        for capture in spoiled:
            capture.invalid = True
        if spoiled:
            raise Refused(cudaError_t.cudaErrorStreamCaptureUnsupported)

    def span(self, call: str, address: int, nbytes: int, writes: bool = False) -> Span:
        """A part of the device's memory (or of page-locked memory) that is going to be used."""
        found = find([*self.memory.values(), *self.pinned.values()], address)
        if found is None:
            raise BrokenRule(6, call, f"{address:#x} is no address of the device, or was freed")
        if not found.holds(address, nbytes):
            over = address + nbytes - found.address - found.nbytes
            raise BrokenRule(6, call, f"{'writes' if writes else 'reads'} {over} bytes past an allocation")
        return Span(found, address, nbytes)

    def stream(self, call: str, handle: object) -> Stream:
        """The stream behind a handle."""
        number = int(handle or 0)  # type: ignore[call-overload]
        if number in (0, 1, 2):
            raise BrokenRule(11, call, "on the default stream, with which other streams have no order")
        if number not in self.streams:
            raise BrokenRule(12, call, f"{handle} is no stream, or was destroyed")
        return self.streams[number]

    def put(self, stream: Stream, work: Work) -> None:
        """Put work on a stream, or into what the stream captures.

        Raises:
            Refused: the capture of this stream has failed before.
            BrokenRule: it uses what work on another stream uses, without an order between them.
        """
        for span in work.spans:
            if span.allocation.device not in (-1, stream.device):
                raise BrokenRule(6, work.call, "uses memory of another device than its stream's")
        if stream.capture is not None:
            if stream.capture.invalid:
                raise Refused(cudaError_t.cudaErrorStreamCaptureInvalidated)
            stream.capture.works.append(work)
            if stream is not stream.capture.origin:
                stream.capture.unjoined.add(stream)
            return
        self._check_order(stream, work)
        run = work.prepare()
        stream.asked += 1
        stream.queue.append((stream.asked, work, run))

    def pending(self) -> Iterator[tuple[Stream, int, Work]]:
        """Work that was asked for and did not run."""
        for stream in self.streams.values():
            for number, work, _ in stream.queue:
                yield stream, number, work

    def in_flight(self, thing: object) -> bool:
        """Whether work that uses it (or must not run beside its like) is not done yet."""
        return any(thing in work.alone or thing in work.holds for _, _, work in self.pending())

    def run(self, stream: Stream, number: int) -> None:
        """Let a stream come as far as a work."""
        self._questions = 0
        while stream.done < number and stream.queue:
            at, work, run = stream.queue.popleft()
            for span in work.spans:
                span.check(work.call)
            run()
            stream.done = at

    def wait(self, call: str, stream: Stream, number: int | None = None) -> None:
        """Wait for a stream, as the host does."""
        self.waited(call)
        self.run(stream, stream.asked if number is None else number)

    def waited(self, call: str) -> None:
        """Count a wait.

        Raises:
            BrokenRule: nobody may wait now.
        """
        if self.quiet:
            raise BrokenRule(38, call, "waits for the device before the picture is done")
        self.counts.waits[call] += 1

    def _check_order(self, stream: Stream, work: Work) -> None:
        for other, number, pending in self.pending():
            if other is stream or stream.after.get(other, 0) >= number:
                continue
            if any(thing in pending.alone for thing in work.alone):
                raise BrokenRule(
                    25, work.call, f"with a context or scratch that {pending.call} uses on another stream"
                )
            shared = [(a, b) for a in work.writes for b in pending.spans]
            shared += [(a, b) for a in work.reads for b in pending.writes]
            if any(a.overlaps(b) for a, b in shared):
                raise BrokenRule(11, work.call, f"uses memory of {pending.call} on a stream without an order")

    def _room(self, nbytes: int, device: int) -> None:
        if self.used(device) + nbytes > self.cards[device].memory:
            raise Refused(cudaError_t.cudaErrorMemoryAllocation)

    def _peak(self, device: int) -> None:
        self.counts.peak = max(self.counts.peak, self.used(device))
