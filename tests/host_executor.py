"""The CPU's executor, made to show mistakes of the plan."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from hart_runtime.runtime.backends.onnx_runtime import CpuExecutor
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.executor import Binding


class HostExecutor(CpuExecutor):
    """As TensorRT is used: fresh memory holds NaN, one input stays on the host, and a call that
    comes again must come with the same addresses, shapes and host inputs.
    """

    name = "planned"
    writes_all = True

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.seen: dict[int, tuple[object, ...]] = {}

    def allocate(self, nbytes: int) -> int:
        address = super().allocate(nbytes)
        ctypes.memset(address, 0xFF, nbytes)
        return address

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        if call is not None:
            key = (graph, tuple(bindings.items()), *(array.tobytes() for array in host.values()))
            assert self.seen.setdefault(call, key) == key
        given = {name: Binding(array.ctypes.data, array.shape, array.dtype) for name, array in host.items()}
        super().execute(graph, {**bindings, **given}, {}, call)

    def on_host(self, graph: str) -> frozenset[str]:
        return frozenset({"top_k"}) if graph == "sample" else frozenset()

    def forget(self, calls: range) -> None:
        for call in calls:
            self.seen.pop(call, None)
