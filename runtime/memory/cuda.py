"""The first GPU's memory and one stream, through cuda-python."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, RunError, parameter
from hart_runtime.common.install import pip
from hart_runtime.runtime.backends.backend import Limits
from hart_runtime.runtime.backends.names import CPU, ONNXRUNTIME
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.executor import Binding, Executor
from hart_runtime.runtime.memory.planned import PlannedBackend


def cuda() -> Any:
    """The runtime bindings of cuda-python.

    Raises:
        InputError: they are not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise InputError(
            f"cuda-python cannot be loaded ({error}); install it with: {pip()} install cuda-bindings"
        ) from None
    return runtime


def check(result: tuple[Any, ...]) -> Any:
    """Value of a CUDA call.

    Raises:
        RunError: the call failed.
    """
    status, *values = result
    if int(status) != 0:
        raise RunError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def compute_capability() -> str | None:
    """That of the first GPU, such as "8.9"; None where there is no GPU (or no cuda-python)."""
    try:
        api = cuda()
        if check(api.cudaGetDeviceCount()) == 0:
            return None
        attribute = api.cudaDeviceAttr
        major = check(api.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMajor, 0))
        minor = check(api.cudaDeviceGetAttribute(attribute.cudaDevAttrComputeCapabilityMinor, 0))
    except (InputError, RunError):
        return None
    return f"{major}.{minor}"


class CudaMemory:
    """The memory half of an :class:`hart_runtime.runtime.memory.executor.Executor`, in stream order.

    All memory that is allocated here is given back with the last reference to it.
    """

    limits: Limits | None = None

    def __init__(self) -> None:
        self._cuda = cuda()
        capability = compute_capability()
        if capability is None:
            raise InputError(
                f"found no CUDA GPU (or no driver for it); "
                f"use {parameter('backend', ONNXRUNTIME)} {parameter('device', CPU)}"
            )
        self.capability = capability
        self._stream = check(self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking))
        self._memory: set[int] = set()
        self._staging: dict[object, tuple[int, int]] = {}
        held = weakref.finalize(self, _give_back, self._cuda, self._stream, self._memory, self._staging)
        held.atexit = False  # the driver does that, and may be gone by then

    def allocate(self, nbytes: int) -> int:
        address = int(check(self._cuda.cudaMalloc(max(nbytes, 1))))
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        self._wait()
        check(self._cuda.cudaFree(address))
        self._memory.discard(address)

    def discard(self, address: int, nbytes: int) -> None:
        pass  # captured graphs want everything to stay where it is

    def upload(self, address: int, array: NDArray[Any], slot: object) -> None:
        staging = self._staged(slot, array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(self._cuda.cudaMemcpyAsync(address, staging, array.nbytes, kind, self._stream))
        if slot is None:
            self._wait()

    def download(self, binding: Binding) -> NDArray[Any]:
        array = np.empty(binding.shape, binding.dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(
            self._cuda.cudaMemcpyAsync(array.ctypes.data, binding.address, array.nbytes, kind, self._stream)
        )
        self._wait()
        return array

    def event(self) -> Any:
        """A CUDA event behind everything on the stream."""
        event = check(self._cuda.cudaEventCreate())
        check(self._cuda.cudaEventRecord(event, self._stream))
        return event

    def mark(self) -> object:
        event = check(self._cuda.cudaEventCreateWithFlags(self._cuda.cudaEventDisableTiming))
        check(self._cuda.cudaEventRecord(event, self._stream))
        return event

    def wait(self, mark: object) -> None:
        check(self._cuda.cudaEventSynchronize(mark))
        check(self._cuda.cudaEventDestroy(mark))

    def seconds_between(self, first: Any, second: Any) -> float:
        """Wait for both events; device time from one to the other."""
        check(self._cuda.cudaEventSynchronize(second))
        return float(check(self._cuda.cudaEventElapsedTime(first, second))) / 1000

    def _staged(self, slot: object, array: NDArray[Any]) -> int:
        """A copy in page-locked host memory, which a slot keeps from picture to picture."""
        address, size = self._staging.get(slot, (0, 0))
        if size < array.nbytes or not address:
            if address:
                self._wait()
                del self._staging[slot]
                check(self._cuda.cudaFreeHost(address))
            address = int(check(self._cuda.cudaMallocHost(max(array.nbytes, 1))))
            self._staging[slot] = (address, array.nbytes)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return address

    def _wait(self) -> None:
        check(self._cuda.cudaStreamSynchronize(self._stream))


def _give_back(api: Any, stream: Any, memory: set[int], staging: dict[object, tuple[int, int]]) -> None:
    """Errors are not looked at: after one that ended a run, every call here fails with the same."""
    api.cudaStreamSynchronize(stream)
    for address in memory:
        api.cudaFree(address)
    for address, _ in staging.values():
        api.cudaFreeHost(address)


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
