"""What a planned backend asks of the library that runs graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hart_runtime.runtime.backends.backend import Limits
from hart_runtime.runtime.shapes import Shape


@dataclass(frozen=True)
class Binding:
    """An address with the shape and type of what lies there."""

    address: int
    shape: Shape
    dtype: np.dtype[Any]


class Executor(Protocol):
    """Memory of a device, and graphs that run on it. Everything happens in the order asked for."""

    name: str
    device: str
    limits: Limits | None
    """See :class:`hart_runtime.runtime.backends.backend.Backend`."""
    writes_all: bool
    """Whether it writes every output of a graph, so that each needs an address."""
    stays: bool
    """Whether it works in the process alone that opened it, and not in one that was forked from that: it
    has threads, or a GPU."""

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory."""

    def free(self, address: int) -> None:
        """Release memory, once everything asked for before is done."""

    def discard(self, address: int, nbytes: int) -> None:
        """What lies in this part of an allocation is not needed any more; more will be written later."""

    def upload(self, address: int, array: NDArray[Any], slot: object) -> None:
        """Copy an array to the device. With a ``slot`` nobody waits: the host buffer behind the
        copy belongs to the slot, and is used again only after a download.
        """

    def download(self, binding: Binding) -> NDArray[Any]:
        """Wait for everything and copy to the host."""

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        """Run a graph without waiting.

        ``host`` holds the inputs the graph wants on the host (see :meth:`on_host`). ``call`` is
        the number of a planned call; with the same number come the same addresses, shapes and host
        inputs until :meth:`forget`.
        """

    def on_host(self, graph: str) -> frozenset[str]:
        """Inputs that the graph reads on the host, because shapes depend on them."""

    def forget(self, calls: range) -> None:
        """Planned calls that will not come again as they were: drop what was captured for them."""

    def mark(self) -> object:
        """A mark behind everything that was asked for so far."""

    def wait(self, mark: object) -> None:
        """Until everything before a mark is done."""
