"""The memory of the played CUDA runtime: allocations, copies, fills."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.strict.cuda_call import Calls, gives
from tests.strict.cuda_names import cudaMemcpyKind
from tests.strict.device import Work
from tests.strict.memory import Span, allocate, checksum, find, holder
from tests.strict.rules import BrokenRule

UP, DOWN = cudaMemcpyKind.cudaMemcpyHostToDevice, cudaMemcpyKind.cudaMemcpyDeviceToHost
BETWEEN = cudaMemcpyKind.cudaMemcpyDeviceToDevice


class MemoryCalls(Calls):
    """Their arguments are CUDA's."""

    @gives(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:
        total = self._card(self._cuda.device()).memory
        return total - self._cuda.used(self._cuda.device()), total

    @gives(1)
    def cudaMalloc(self, size: int) -> int:
        self._cuda.forbidden("cudaMalloc")
        return self._cuda.take(size) if size else 0

    @gives()
    def cudaFree(self, devPtr: int) -> None:
        self._cuda.forbidden("cudaFree")
        if devPtr:
            self._give_back(self._cuda.memory, "cudaFree", int(devPtr), 7)

    @gives(1)
    def cudaMallocHost(self, size: int) -> int:
        return self._page_locked("cudaMallocHost", size)

    @gives(1)
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        return self._page_locked("cudaHostAlloc", size)

    @gives()
    def cudaFreeHost(self, ptr: int) -> None:
        self._cuda.forbidden("cudaFreeHost")
        self._give_back(self._cuda.pinned, "cudaFreeHost", int(ptr), 9)

    @gives()
    def cudaMemcpy(self, dst: Any, src: Any, count: int, kind: cudaMemcpyKind) -> None:
        self._at_once("cudaMemcpy", self._copy("cudaMemcpy", dst, src, count, kind, pageable=True))

    @gives()
    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: cudaMemcpyKind, stream: Any) -> None:
        on = self._cuda.stream("cudaMemcpyAsync", stream)
        work = self._copy("cudaMemcpyAsync", dst, src, count, kind, capturing=on.capture is not None)
        self._cuda.put(on, work)

    @gives()
    def cudaMemset(self, devPtr: int, value: int, count: int) -> None:
        self._at_once("cudaMemset", self._fill("cudaMemset", devPtr, value, count))

    @gives()
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> None:
        on = self._cuda.stream("cudaMemsetAsync", stream)
        self._cuda.put(on, self._fill("cudaMemsetAsync", devPtr, value, count))

    def _page_locked(self, call: str, size: int) -> int:
        self._cuda.forbidden(call)
        made = allocate(size, -1)
        self._cuda.pinned[made.address] = made
        return made.address

    def _give_back(self, where: dict[int, Any], call: str, address: int, rule: int) -> None:
        if address not in where:
            raise BrokenRule(6, call, f"{address:#x} was not allocated, or was freed before")
        if any(s.allocation is where[address] for _, _, work in self._cuda.pending() for s in work.spans):
            raise BrokenRule(rule, call, "while work that uses the memory is in flight")
        where.pop(address).freed = True

    def _at_once(self, call: str, work: Work) -> None:
        """What happens on the default stream while the host waits."""
        self._cuda.forbidden(call)
        self._cuda.waited(call)
        for stream in [*self._cuda.streams.values()]:
            if stream.blocking:
                self._cuda.run(stream, stream.asked)
        mine = work.spans
        for _, _, other in self._cuda.pending():
            if any(a.overlaps(b) for a in mine for b in other.spans):
                raise BrokenRule(11, call, f"has no order with {other.call} on a non-blocking stream")
        work.prepare()()

    def _fill(self, call: str, address: int, value: int, count: int) -> Work:
        span = self._cuda.span(call, int(address), count, writes=True)

        def run() -> None:
            ctypes.memset(int(address), value, count)

        return Work(call, lambda: run, writes=(span,))

    def _copy(
        self,
        call: str,
        dst: Any,
        src: Any,
        count: int,
        kind: cudaMemcpyKind,
        pageable: bool = False,
        capturing: bool = False,
    ) -> Work:
        kind = cudaMemcpyKind(kind.value)  # a plain number is refused, as by the real bindings
        to, source = _address(dst), _address(src)
        writes, keeper = self._side(call, dst, to, count, kind in {UP, BETWEEN})
        reads, owner = self._side(call, src, source, count, kind in {DOWN, BETWEEN})
        if capturing and (keeper or owner):
            raise BrokenRule(10, call, "with pageable memory while the stream is capturing")
        if owner and not pageable:
            raise BrokenRule(8, call, "from pageable memory is not asynchronous")
        if keeper and not pageable:
            self._cuda.waited(f"{call} to pageable memory")
        if kind == DOWN and self._cuda.quiet:
            raise BrokenRule(38, call, "copies from the device before the picture is done")

        def prepare() -> Callable[[], None]:
            asked = checksum(source, count) if kind == UP else 0
            counted = self._cuda.counts
            counted.uploads += kind == UP
            counted.upload_bytes += count * (kind == UP)
            counted.downloads += kind == DOWN
            counted.download_bytes += count * (kind == DOWN)

            def run() -> None:
                if keeper is not None and keeper() is None:
                    raise BrokenRule(9, call, "the array that it copies to was collected before it ran")
                if kind == UP and checksum(source, count) != asked:
                    raise BrokenRule(8, call, "the bytes that it copies were changed before it ran")
                ctypes.memmove(to, source, count)

            return run

        return Work(call, prepare, reads=reads, writes=writes)

    def _side(
        self, call: str, given: Any, address: int, count: int, device: bool
    ) -> tuple[tuple[Span, ...], weakref.ref[Any] | None]:
        """What a copy uses on one side: a part of an allocation, or pageable memory with who holds it."""
        found = find(self._cuda.pinned.values(), address)
        if device:
            if found is not None:
                raise BrokenRule(6, call, f"{address:#x} is no address of the device")
            return (self._cuda.span(call, address, count),), None
        if found is not None:
            return (self._cuda.span(call, address, count),), None
        if find(self._cuda.memory.values(), address) is not None:
            raise BrokenRule(6, call, f"{address:#x} is an address of the device, not of the host")
        array = given if isinstance(given, np.ndarray) else holder(address, count)
        if array is None:
            raise BrokenRule(9, call, f"nobody holds the host memory at {address:#x}")
        return (), weakref.ref(array)


def _address(given: Any) -> int:
    return given.ctypes.data if isinstance(given, np.ndarray) else int(given)
