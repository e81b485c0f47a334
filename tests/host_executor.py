"""Runs planned calls with ONNX Runtime at raw host addresses.

What TensorRT backends share (the plan, the append-only cache, uploads, calls outside the plan)
is tested with real graphs on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.plan import engine_graph
from runtime.planned import Binding


class HostExecutor:
    """Host memory as the device. Freed and fresh memory is full of NaN, to show who reads it."""

    device = "cpu"

    def __init__(self, bundle: Bundle) -> None:
        self.memory: dict[int, Any] = {}
        self.seen: dict[int, tuple[object, ...]] = {}
        names = [name for name in bundle.manifest.graphs if not name.startswith("transformer")]
        self.sessions = {
            name: ort.InferenceSession(
                bundle.path(engine_graph(bundle.manifest, name).file), providers=["CPUExecutionProvider"]
            )
            for name in [*names, "transformer"]
        }

    def allocate(self, nbytes: int) -> int:
        memory = ctypes.create_string_buffer(b"\xff" * max(nbytes, 1), max(nbytes, 1))
        address = ctypes.addressof(memory)
        self.memory[address] = memory
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def upload(self, address: int, array: NDArray[Any], slot: object) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, binding: Binding) -> NDArray[Any]:
        nbytes = int(np.prod(binding.shape)) * binding.dtype.itemsize
        raw = ctypes.string_at(binding.address, nbytes)
        return np.frombuffer(raw, binding.dtype).reshape(binding.shape)

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        session = self.sessions[graph]
        if call is not None:  # what a captured call relies on
            key = (graph, tuple(bindings.items()), *(array.tobytes() for array in host.values()))
            assert self.seen.setdefault(call, key) == key
        io = session.io_binding()
        inputs = {value.name for value in session.get_inputs()}
        for name, b in bindings.items():
            bind = io.bind_input if name in inputs else io.bind_output
            bind(name, "cpu", 0, b.dtype.type, list(b.shape), b.address)
        for name, array in host.items():
            io.bind_cpu_input(name, array)
        session.run_with_iobinding(io)

    def on_host(self, graph: str) -> frozenset[str]:
        return frozenset({"top_k"}) if graph == "sample" else frozenset()

    def forget(self) -> None:
        self.seen.clear()
