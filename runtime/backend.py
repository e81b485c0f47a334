"""A backend opens the graphs of a bundle and runs one; it knows nothing of the loop.

Tensors stay where they were computed: what a graph returns is passed to the next one as it
is, and only :meth:`Backend.to_host` brings anything back.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from hart_runtime.common.errors import InputError
from hart_runtime.common.schedule import SamplingSettings
from hart_runtime.runtime.bundle import INT8, Bundle
from hart_runtime.runtime.choices import OPENVINO
from hart_runtime.runtime.tensorrt.package import MODULES

log = logging.getLogger(__name__)

Tensor = Any
"""A device tensor of the backend, opaque to the loop."""
Value = Tensor | NDArray[Any]


class Backend(Protocol):
    """What the loop needs. Arrays given as inputs are uploaded, tensors are used in place."""

    name: str
    """As in ``--backend``."""
    device: str

    def prepare(self, batch: int, settings: SamplingSettings) -> None:
        """Told before each drawing; backends that plan their memory do it here."""

    def run(self, graph: str, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        """Run one graph; all outputs by name, on the device."""

    def split(self, value: Tensor) -> list[Tensor]:
        """One tensor per picture of a batch, each with a leading axis of 1."""

    def to_host(self, value: Value) -> NDArray[Any]:
        """Copy a tensor to the host, waiting for it; an array is returned as it is."""


def open_backend(
    bundle: Bundle,
    device: str = "auto",
    threads: int | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> Backend:
    """Load every graph of a bundle.

    Args:
        device: "cpu", "cuda" or "auto".
        threads: of the CPU; None for all cores.
        backend: one of :data:`hart_runtime.runtime.choices.BACKENDS`. "auto": the bundle's engines where they
            run, else ONNX Runtime on CUDA, else on the CPU. What "auto" passes over is logged; a
            backend asked for by name is never replaced.
        strict: refuse, instead of warn of, ONNX Runtime CUDA graphs with work on the CPU.

    Raises:
        InputError: what was asked for is not there, with the command that mends it.
    """
    from hart_runtime.runtime.onnx_backend import on_cuda, on_the_cpu
    from hart_runtime.runtime.sessions import has_cuda

    if backend == OPENVINO:
        from hart_runtime.runtime.openvino_backend import on_openvino

        if device == "cuda":
            raise InputError("--backend openvino runs on the CPU, found --device cuda")
        return on_openvino(bundle, threads)
    if bundle.manifest.precision == INT8:
        if device == "cuda" or backend in MODULES:
            asked = f"--backend {backend}" if backend in MODULES else f"--device {device}"
            raise InputError(
                f"{asked}: {bundle.folder} is an {INT8} bundle, which runs on the CPU with onnxruntime or "
                "openvino; export the checkpoint with --precision fp16 for a GPU"
            )
        device = "cpu"
    if backend in MODULES:
        if device == "cpu":
            raise InputError(f"--backend {backend} runs on a GPU, found --device cpu")
        return _open_engines(bundle, backend)
    if device != "cpu" and backend == "auto":
        for name in _engine_backends_of(bundle):
            try:
                return _open_engines(bundle, name)
            except InputError as error:
                log.warning("the %s engines are not used: %s", name, error)
    if device == "auto" and has_cuda():
        try:
            return on_cuda(bundle, threads, strict)
        except InputError as error:
            log.warning("drawing on the CPU: %s", error)
    if device == "cuda":
        return on_cuda(bundle, threads, strict)
    return on_the_cpu(bundle, threads)


def _open_engines(bundle: Bundle, name: str) -> Backend:
    from hart_runtime.runtime.cuda import StreamBackend
    from hart_runtime.runtime.tensorrt.executor import EngineExecutor
    from hart_runtime.runtime.tensorrt.package import import_package

    return StreamBackend(bundle, EngineExecutor(bundle, import_package(name)))


def _engine_backends_of(bundle: Bundle) -> list[str]:
    """Those that a bundle holds engines for."""
    return [name for name in MODULES if any(bundle.folder.glob(f"{name}-[0-9]*"))]
