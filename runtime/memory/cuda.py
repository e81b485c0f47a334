"""A GPU's memory and one stream, through cuda-python."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import RunError, parameter
from hart_runtime.runtime.backends.backend import Limits
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.executor import Binding, Executor
from hart_runtime.runtime.memory.gpu import check, cuda, find_gpu
from hart_runtime.runtime.memory.planned import PlannedBackend

OUT_OF_MEMORY = 2
"""Status of CUDA."""


@dataclass(frozen=True, eq=False)
class Event:
    """A mark on the stream. CUDA's own event behind it is used again once nobody holds this."""

    handle: Any


@dataclass(eq=False)
class _Held:
    """Everything that has to be given back, in the hands of nobody but the finalizer."""

    stream: Any
    memory: set[int] = field(default_factory=set)
    staging: dict[object, tuple[int, int]] = field(default_factory=dict)
    """Page-locked buffers by slot: address and size."""
    events: list[Any] = field(default_factory=list)
    closing: list[Callable[[], object]] = field(default_factory=list)
    """Called in their order, before the memory goes."""


class CudaMemory:
    """The memory half of an :class:`hart_runtime.runtime.memory.executor.Executor`, in stream order.

    Everything that is made here is given back with the last reference to it, and before it what
    subclasses add to :attr:`closing`.
    """

    limits: Limits | None = None
    writes_all = False
    stays = True

    def __init__(self, index: int = 0) -> None:
        """``index`` of the GPU among those that CUDA sees.

        Raises:
            InputError: there is no such GPU, or what it needs is not installed.
        """
        self.gpu = find_gpu(index)
        self.index = index
        self._cuda = cuda()
        self._here()
        self._stream = check(self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking))
        self._held = _Held(self._stream)
        self.closing = self._held.closing
        self._idle: dict[bool, list[Any]] = {True: [], False: []}
        held = weakref.finalize(self, _give_back, self._cuda, self._held)
        held.atexit = False  # the driver does that, and may be gone by then

    def allocate(self, nbytes: int) -> int:
        self._here()
        address = int(self._allocated(self._cuda.cudaMalloc(max(nbytes, 1)), nbytes))
        self._held.memory.add(address)
        return address

    def free(self, address: int) -> None:
        self._wait()
        check(self._cuda.cudaFree(address))
        self._held.memory.discard(address)

    def discard(self, address: int, nbytes: int) -> None:
        pass  # captured graphs want everything to stay where it is

    def upload(self, address: int, array: NDArray[Any], slot: Hashable) -> None:
        staging = self._staged(slot, array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(self._cuda.cudaMemcpyAsync(address, staging, array.nbytes, kind, self._stream))
        if slot is None:
            self._wait()

    def download(self, binding: Binding) -> NDArray[Any]:
        array = np.empty(binding.shape, binding.dtype)
        landing = self._page_locked("landing", array.nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(self._cuda.cudaMemcpyAsync(landing, binding.address, array.nbytes, kind, self._stream))
        self._wait()
        ctypes.memmove(array.ctypes.data, landing, array.nbytes)
        return array

    def event(self) -> Event:
        """A mark behind everything on the stream, that times can be taken between."""
        return self._recorded(timed=True)

    def mark(self) -> Event:
        return self._recorded(timed=False)

    def wait(self, mark: Any) -> None:
        check(self._cuda.cudaEventSynchronize(mark.handle))

    def seconds_between(self, first: Any, second: Any) -> float:
        """Wait for both events; device time from one to the other."""
        self.wait(second)
        return float(check(self._cuda.cudaEventElapsedTime(first.handle, second.handle))) / 1000

    def _recorded(self, timed: bool) -> Event:
        idle = self._idle[timed]
        if idle:
            handle = idle.pop()
        else:
            self._here()
            flags = 0 if timed else self._cuda.cudaEventDisableTiming
            handle = check(self._cuda.cudaEventCreateWithFlags(flags))
            self._held.events.append(handle)
        check(self._cuda.cudaEventRecord(handle, self._stream))
        event = Event(handle)
        weakref.finalize(event, idle.append, handle).atexit = False
        return event

    def _staged(self, slot: Hashable, array: NDArray[Any]) -> int:
        """A copy in page-locked host memory, which a slot keeps from picture to picture."""
        address = self._page_locked(slot, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address

    def _page_locked(self, slot: Hashable, nbytes: int) -> int:
        address, size = self._held.staging.get(slot, (0, 0))
        if size < nbytes or not address:
            self._unstage([slot])
            self._here()
            address = int(self._allocated(self._cuda.cudaMallocHost(max(nbytes, 1)), nbytes))
            self._held.staging[slot] = (address, nbytes)
        return address

    def _unstage(self, slots: Iterable[Hashable]) -> None:
        """Give the buffers of slots back that will not come again."""
        there = [slot for slot in slots if slot in self._held.staging]
        if there:
            self._wait()
        for slot in there:
            address, _ = self._held.staging.pop(slot)
            check(self._cuda.cudaFreeHost(address))

    def _forget_staged(self, calls: range) -> None:
        """The buffers of planned calls, whose slots begin with the call's number."""
        held = self._held.staging
        self._unstage([slot for slot in held if isinstance(slot, tuple) and slot[0] in calls])

    def _allocated(self, result: tuple[Any, ...], nbytes: int) -> Any:
        if int(result[0]) != OUT_OF_MEMORY:
            return check(result)
        self._cuda.cudaGetLastError()  # or the next call would report it again
        status, *sizes = self._cuda.cudaMemGetInfo()
        free = (
            f"{sizes[0] / 1e6:.0f} MB of {sizes[1] / 1e6:.0f} MB are free" if int(status) == 0 else "too few"
        )
        raise RunError(
            f"CUDA: out of memory on {self.gpu.name}: {nbytes / 1e6:.0f} MB were asked for, {free}; "
            f"draw fewer pictures at once ({parameter('batch', 1)}), or close what else uses the GPU"
        )

    def _here(self) -> None:
        """Make this GPU the one that the calling thread works on: each thread has its own choice."""
        check(self._cuda.cudaSetDevice(self.index))

    def _wait(self) -> None:
        check(self._cuda.cudaStreamSynchronize(self._stream))


def _give_back(api: Any, held: _Held) -> None:
    """Errors are not looked at: after one that ended a run, every call here fails with the same."""
    api.cudaStreamSynchronize(held.stream)
    for close in held.closing:
        close()
    for address in held.memory:
        api.cudaFree(address)
    for address, _ in held.staging.values():
        api.cudaFreeHost(address)
    for event in held.events:
        api.cudaEventDestroy(event)
    api.cudaStreamDestroy(held.stream)


class StreamExecutor(Executor, Protocol):
    """An executor with a stream of its own."""

    def event(self) -> Any:
        """Place a mark behind everything that was submitted so far."""

    def seconds_between(self, first: Any, second: Any) -> float:
        """Wait for both marks; the time the device took from one to the other."""


class StreamBackend(PlannedBackend):
    """The loop on a stream that can be timed."""

    def __init__(self, bundle: Bundle, executor: StreamExecutor) -> None:
        super().__init__(bundle, executor)
        self.event = executor.event
        self.seconds_between = executor.seconds_between
