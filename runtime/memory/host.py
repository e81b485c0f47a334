"""Memory of the host, for executors that compute on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.runtime.backends.backend import Limits
from hart_runtime.runtime.memory.executor import Binding


class HostMemory:
    """The memory half of an executor (see :class:`hart_runtime.runtime.memory.executor.Executor`)."""

    device = "cpu"
    limits: Limits | None = None
    writes_all = False
    stays = True

    def __init__(self) -> None:
        self._memory: dict[int, mmap.mmap] = {}

    def allocate(self, nbytes: int) -> int:
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, max(nbytes, 1), **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # it only saves time
                memory.madvise(mmap.MADV_HUGEPAGE)
        address = np.frombuffer(memory, np.uint8).ctypes.data
        self._memory[address] = memory
        return address

    def free(self, address: int) -> None:
        del self._memory[address]

    def discard(self, address: int, nbytes: int) -> None:
        """Give whole pages back to the system (where it can take them) until they are used again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start, memory = next((a, m) for a, m in self._memory.items() if a <= address < a + len(m))
        first = -(-(address - start) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (address - start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            memory.madvise(mmap.MADV_DONTNEED, first, end - first)

    def upload(self, address: int, array: NDArray[Any], slot: object) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, binding: Binding) -> NDArray[Any]:
        return array_at(binding).copy()

    def on_host(self, graph: str) -> frozenset[str]:
        return frozenset()  # the device is the host

    def forget(self, calls: range) -> None:
        pass  # nothing was captured

    def mark(self) -> object:
        return None

    def wait(self, mark: object) -> None:
        pass  # what was asked for is done


def array_at(binding: Binding) -> NDArray[Any]:
    """What lies at an address, without a copy. The memory has to outlive the array."""
    nbytes = int(np.prod(binding.shape, dtype=np.int64)) * binding.dtype.itemsize
    if nbytes == 0:
        return np.empty(binding.shape, binding.dtype)
    memory = (ctypes.c_byte * nbytes).from_address(binding.address)
    return np.ctypeslib.as_array(memory).view(binding.dtype).reshape(binding.shape)
