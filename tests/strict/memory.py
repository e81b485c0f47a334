"""Memory of a device that is played by the host, and who holds memory of the host."""

from __future__ import annotations

import ctypes
import inspect
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.strict.rules import BrokenRule

ALIGNMENT = 256
"""What CUDA promises of an allocation's address, and all that it promises."""


@dataclass(eq=False)
class Allocation:
    """Memory that was asked for."""

    address: int
    nbytes: int
    memory: NDArray[Any]
    device: int
    """Number of the device; -1 is page-locked memory of the host."""
    freed: bool = False

    def holds(self, address: int, nbytes: int) -> bool:
        return self.address <= address and address + nbytes <= self.address + self.nbytes


class Span(NamedTuple):
    """A part of an allocation that some work uses."""

    allocation: Allocation
    start: int
    """Address."""
    nbytes: int

    def overlaps(self, other: Span) -> bool:
        return (
            self.allocation is other.allocation
            and self.start < other.start + other.nbytes
            and other.start < self.start + self.nbytes
        )

    def check(self, call: str) -> None:
        """Raises BrokenRule if the memory was given back since it was asked to be used."""
        if self.allocation.freed:
            raise BrokenRule(6, call, f"{self.nbytes} bytes at {self.start:#x} were freed before it ran")


def allocate(nbytes: int, device: int) -> Allocation:
    """New memory, full of NaN, at a multiple of 256 that is not one of 512."""
    memory = np.full(nbytes + 3 * ALIGNMENT, 0xFF, np.uint8)
    start = memory.ctypes.data
    address = -(-start // (2 * ALIGNMENT)) * 2 * ALIGNMENT + ALIGNMENT
    return Allocation(address, nbytes, memory, device)


def find(allocations: Iterable[Allocation], address: int) -> Allocation | None:
    """Where an address lies; the end of an allocation counts, as empty tensors may lie there."""
    inside = [a for a in allocations if a.holds(address, 0)]
    return max(inside, key=lambda a: a.address, default=None)


def array_at(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """What lies at an address, without a copy."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if nbytes == 0:
        return np.empty(shape, dtype)
    return np.ctypeslib.as_array((ctypes.c_byte * nbytes).from_address(address)).view(dtype).reshape(shape)


def checksum(address: int, nbytes: int) -> int:
    return zlib.crc32((ctypes.c_byte * nbytes).from_address(address)) if nbytes else 0


def holder(address: int, nbytes: int) -> NDArray[Any] | None:
    """The array that owns this part of pageable memory, if the caller (or one of its callers) holds it.

    An address says nothing of its owner. Who passes one has to keep the array: in a variable, an
    attribute or a list, and there it is found.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        seen = frame.f_locals
        found = next((a for a in _arrays([*seen.values()]) if _inside(a, address, nbytes)), None)
        if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            seen.clear()  # a copy that the frame would keep, and everything in it alive
        if found is not None:
            return _root(found)
        frame = frame.f_back
    return None


def _inside(array: NDArray[Any], address: int, nbytes: int) -> bool:
    start = array.ctypes.data
    return start <= address and address + nbytes <= start + array.nbytes


def _root(array: NDArray[Any]) -> NDArray[Any]:
    """The array that a view looks into."""
    return _root(array.base) if isinstance(array.base, np.ndarray) else array


def _arrays(values: Iterable[object], depth: int = 2) -> Iterator[NDArray[Any]]:
    for value in values:
        if isinstance(value, np.ndarray):
            yield value
        elif depth and isinstance(value, dict):
            yield from _arrays([*value.values()], depth - 1)
        elif depth and isinstance(value, list | tuple | set):
            yield from _arrays([*value], depth - 1)
        elif depth and type(value).__module__.partition(".")[0] in {"hart_runtime", "tests"}:
            yield from _arrays([*getattr(value, "__dict__", {}).values()], depth - 1)
