"""ONNX Runtime at planned addresses, on the CPU and on CUDA."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, RunError, first_line, parameter
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.backends.names import CPU, CUDA, ONNXRUNTIME
from hart_runtime.runtime.backends.sessions import OnGpu, Sessions, require_cuda
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.cuda import CudaMemory, StreamBackend
from hart_runtime.runtime.memory.executor import Binding
from hart_runtime.runtime.memory.gpu import Gpu
from hart_runtime.runtime.memory.host import HostMemory
from hart_runtime.runtime.memory.planned import PlannedBackend
from hart_runtime.runtime.spec import GraphSpec

log = logging.getLogger(__name__)

NOT_CAPTURED = -1
"""What ONNX Runtime takes as the number of a run that is no CUDA graph."""
OLDEST_CAPABILITY = (7, 5)
"""Of the kernels in its distributions."""


class CpuExecutor(HostMemory):
    """ONNX Runtime at host addresses (see :class:`hart_runtime.runtime.memory.executor.Executor`)."""

    name = ONNXRUNTIME

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__()
        self.stays = threads != 1  # otherwise graphs run in the thread that asks for them
        self._graphs = bundle.manifest.graphs
        self._sessions = Sessions(bundle, threads)

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        run_bound(self._sessions[graph], self._graphs[graph], graph, bindings, host, (CPU, 0))


class CudaExecutor(CudaMemory):
    """ONNX Runtime on a GPU, all graphs on one stream.

    Every planned call is run plainly the first time; with the second ONNX Runtime captures it as
    a CUDA graph, under a number that is never used for another call, and replays it from then on.
    """

    name, device = ONNXRUNTIME, CUDA

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        strict: bool = False,
        index: int = 0,
        tf32: bool = False,
    ) -> None:
        require_cuda()
        super().__init__(index)
        require_capability(self.gpu)
        self._graphs = bundle.manifest.graphs
        place = OnGpu(int(self._stream), index, tf32, strict)
        self._sessions = Sessions(bundle, threads, place)
        self.closing.append(self._sessions.clear)
        self._on_host: dict[str, frozenset[str]] = {}
        self._seen: set[int] = set()
        self._plain: set[str] = set()
        """Graphs that could not be captured."""
        self._numbers: dict[int, tuple[str, int]] = {}
        self._captured = 0

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        self._here()
        run = functools.partial(self._run, graph, bindings, host)
        if call in self._numbers:
            run(self._numbers[call][1])
        elif call in self._seen and graph not in self._plain:
            self._capture(graph, call, run)
        else:
            run(NOT_CAPTURED)
            if call is not None:
                self._seen.add(call)

    def _capture(self, graph: str, call: int, run: Callable[[int], None]) -> None:
        """A planned call's second run. Where it fails, as when another thread asks for memory on the GPU
        meanwhile, it is run plainly, and so are all calls of its graph from then on.
        """
        self._captured += 1
        try:
            run(self._captured)
            self._numbers[call] = graph, self._captured
        except RunError as error:
            self._plain.add(graph)
            ended = self._cuda.cudaStreamEndCapture(self._stream)  # it can do nothing else until then
            if int(ended[0]) == 0:
                self._cuda.cudaGraphDestroy(ended[1])
            self._cuda.cudaGetLastError()  # a failed capture leaves its error behind
            log.warning("%s; it runs without CUDA graphs from now on", str(error))  # the error holds us
            run(NOT_CAPTURED)

    def _run(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], number: int
    ) -> None:
        import onnxruntime as ort

        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(number))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        where = CUDA, self.index
        run_bound(self._sessions[graph], self._graphs[graph], graph, bindings, host, where, options)

    def on_host(self, graph: str) -> frozenset[str]:
        if graph not in self._on_host:
            memories = self._sessions[graph].get_input_memory_infos()
            self._on_host[graph] = frozenset(
                spec.name
                for spec, memory in zip(self._graphs[graph].inputs, memories, strict=True)
                if memory.name.lower().startswith("cpu")
            )
        return self._on_host[graph]

    def forget(self, calls: range) -> None:
        self._wait()
        self._forget_staged(calls)
        self._seen -= set(calls)
        for call in calls:
            graph, number = self._numbers.pop(call, ("", 0))
            if number and (release := getattr(self._sessions[graph], "release_captured_graph", None)):
                release(number)  # from 1.32 on


def run_bound(
    session: Any,
    spec: GraphSpec,
    graph: str,
    bindings: Mapping[str, Binding],
    host: Mapping[str, NDArray[Any]],
    device: tuple[str, int],
    options: Any = None,
) -> None:
    """Run a session on what lies at the addresses of ``bindings``, and on ``host`` arrays.

    Args:
        device: kind and number.

    Raises:
        RunError: ONNX Runtime failed, with the first line of what it says.
    """
    inputs = {tensor.name for tensor in spec.inputs}
    try:
        io = session.io_binding()
        for name, bound in bindings.items():
            bind = io.bind_input if name in inputs else io.bind_output
            bind(name, *device, bound.dtype.type, bound.shape, bound.address)
        for name, array in host.items():
            io.bind_cpu_input(name, array)
        session.run_with_iobinding(io, options)
    except Exception as error:  # the runtime's exceptions have no public base class
        raise RunError(f"graph {graph}: {first_line(error)}") from None


def on_the_cpu(bundle: Bundle, threads: int | None = None) -> Backend:
    """The CPU backend of a bundle."""
    return PlannedBackend(bundle, CpuExecutor(bundle, threads))


def on_cuda(
    bundle: Bundle, threads: int | None = None, strict: bool = False, index: int = 0, tf32: bool = False
) -> Backend:
    """The CUDA backend of a bundle."""
    return StreamBackend(bundle, CudaExecutor(bundle, threads, strict, index, tf32))


def require_capability(gpu: Gpu) -> None:
    """Raises InputError for a GPU that ONNX Runtime has no kernels for."""
    if tuple(int(part) for part in gpu.capability.split(".")) < OLDEST_CAPABILITY:
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        raise InputError(
            f"{parameter('device', CUDA)}: ONNX Runtime has kernels from compute capability {oldest} on, "
            f"{gpu} has {gpu.capability}; use {parameter('device', CPU)}"
        )
