"""A backend opens the graphs of a bundle and runs one; it knows nothing of the loop.

Tensors stay where they were computed: what a graph returns is passed to the next one as it
is, and only :meth:`Backend.to_host` brings anything back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from hart.errors import InputError
from runtime.bundle import Bundle

Tensor = Any
"""A device tensor of the backend, opaque to the loop."""
Value = Tensor | NDArray[Any]


class Backend(Protocol):
    """What the loop needs. Arrays given as inputs are uploaded, tensors are used in place."""

    device: str

    def run(self, graph: str, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        """Run one graph; all outputs by name, on the device."""

    def to_host(self, value: Value) -> NDArray[Any]:
        """Copy a tensor to the host, waiting for it; an array is returned as it is."""


def open_backend(
    bundle: Bundle, device: str = "auto", threads: int | None = None, backend: str = "auto"
) -> Backend:
    """Load every graph of a bundle on "cpu", "cuda" or "auto"."""
    from runtime.onnx_backend import OnnxRuntimeBackend

    if backend not in ("auto", "onnxruntime"):
        raise InputError(f"--backend {backend}: expected auto or onnxruntime")
    return OnnxRuntimeBackend(bundle, device, threads)
