"""ONNX Runtime: on the CPU at planned addresses, on CUDA with IO binding."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart.errors import RunError
from hart.schedule import SamplingSettings
from runtime.backend import Backend, Tensor, Value
from runtime.bundle import Bundle
from runtime.planned import Binding, PlannedBackend
from runtime.sessions import first_line, open_sessions


class CpuExecutor:
    """ONNX Runtime at host addresses (see :class:`runtime.planned.Executor`)."""

    name, device = "onnxruntime", "cpu"

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        graphs = bundle.manifest.planned_graphs
        self._sessions = open_sessions(bundle, graphs, "cpu", threads)
        self._inputs = {name: {spec.name for spec in graph.inputs} for name, graph in graphs.items()}
        self._memory: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, nbytes: int) -> int:
        memory = np.empty(max(nbytes, 1), np.uint8)
        self._memory[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        del self._memory[address]

    def upload(self, address: int, array: NDArray[Any], slot: object) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, binding: Binding) -> NDArray[Any]:
        array = np.empty(binding.shape, binding.dtype)
        ctypes.memmove(array.ctypes.data, binding.address, array.nbytes)
        return array

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        session = self._sessions[graph]
        try:
            io = session.io_binding()
            for name, bound in bindings.items():
                bind = io.bind_input if name in self._inputs[graph] else io.bind_output
                bind(name, "cpu", 0, bound.dtype.type, bound.shape, bound.address)
            session.run_with_iobinding(io)
        except Exception as error:  # the runtime's exceptions have no public base class
            raise RunError(f"graph {graph}: {first_line(error)}") from None

    def on_host(self, graph: str) -> frozenset[str]:
        return frozenset()  # the device is the host

    def forget(self) -> None:
        pass  # nothing was captured


def on_the_cpu(bundle: Bundle, threads: int | None = None) -> Backend:
    """The CPU backend of a bundle."""
    return PlannedBackend(bundle, CpuExecutor(bundle, threads))


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime with IO binding, on CUDA (or, to test it, on the CPU)."""

    name = "onnxruntime"

    def __init__(
        self, bundle: Bundle, device: str = "cuda", threads: int | None = None, strict: bool = False
    ) -> None:
        import onnxruntime as ort

        self._ort = ort
        self.device = device
        graphs = bundle.manifest.bound_graphs
        self._sessions = open_sessions(bundle, graphs, device, threads, strict)
        self._dtypes = {
            name: {spec.name: np.dtype(spec.dtype) for spec in graph.inputs} for name, graph in graphs.items()
        }
        self._outputs = {name: [spec.name for spec in graph.outputs] for name, graph in graphs.items()}

    def prepare(self, batch: int, settings: SamplingSettings) -> None:
        pass  # ONNX Runtime plans each graph's memory itself

    def run(self, graph: str, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        session = self._sessions[graph]
        try:
            binding = session.io_binding()
            # Kept until the run is over: older runtimes only borrow the memory behind a value.
            bound = {name: self._upload(v, self._dtypes[graph][name]) for name, v in inputs.items()}
            for name, value in bound.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs[graph]:
                binding.bind_output(name, self.device)
            session.run_with_iobinding(binding)
        except Exception as error:  # the runtime's exceptions have no public base class
            raise RunError(f"graph {graph}: {first_line(error)}") from None
        return dict(zip(self._outputs[graph], binding.get_outputs(), strict=True))

    def split(self, value: Tensor) -> list[Tensor]:
        return list(self.to_host(value)[:, None])

    def to_host(self, value: Value) -> NDArray[Any]:
        return value if isinstance(value, np.ndarray) else np.asarray(value.numpy())

    def _upload(self, value: Value, dtype: np.dtype[Any]) -> Tensor:
        if not isinstance(value, np.ndarray):
            return value
        array = np.ascontiguousarray(value, dtype)
        return self._ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
