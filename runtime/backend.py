"""What the loop asks of a backend: it runs one graph of a bundle and knows nothing of the loop.

Tensors stay where they were computed: what a graph returns is passed to the next one as it
is, and only :meth:`Backend.to_host` brings anything back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from hart_runtime.common.settings import SamplingSettings

Tensor = Any
"""A device tensor of the backend, opaque to the loop."""
Value = Tensor | NDArray[Any]


class Backend(Protocol):
    """What the loop needs. Arrays given as inputs are uploaded, tensors are used in place."""

    name: str
    """As in :data:`hart_runtime.runtime.registry.BACKENDS`."""
    device: str

    def prepare(self, batch: int, settings: SamplingSettings) -> None:
        """Told before each drawing; backends that plan their memory do it here."""

    def run(self, graph: str, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        """Run one graph; all outputs by name, on the device."""

    def split(self, value: Tensor) -> list[Tensor]:
        """One tensor per picture of a batch, each with a leading axis of 1."""

    def to_host(self, value: Value) -> NDArray[Any]:
        """Copy a tensor to the host, waiting for it; an array is returned as it is."""
