"""Runs engines: CUDA memory, one stream, one scratch allocation, captured graphs."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from hart.errors import InputError, RunError
from runtime.bundle import Bundle
from runtime.planned import Binding, PlannedBackend
from runtime.tensorrt.device import check, compute_capability, cuda
from runtime.tensorrt.engines import EngineManifest, engine_file, find_engines
from runtime.tensorrt.package import Package
from runtime.tensorrt.profiles import choose

log = logging.getLogger(__name__)


class EngineExecutor:
    """An executor of planned calls (see :class:`runtime.planned.Executor`) on the first GPU.

    Every planned call is run plainly twice, captured as a CUDA graph with the second run and
    replayed from then on. TensorRT-RTX captures on its own.
    """

    device = "cuda"

    def __init__(self, bundle: Bundle, package: Package) -> None:
        capability = compute_capability()
        if capability is None:
            raise InputError(
                f"--backend {package.name}: found no CUDA GPU (or no driver for it); "
                f"use --backend onnxruntime --device cpu"
            )
        folder, self.manifest = find_engines(bundle, package, capability)
        self._cuda = cuda()
        self._stream = check(self._cuda.cudaStreamCreateWithFlags(self._cuda.cudaStreamNonBlocking))
        self._package = package
        self.name = package.name
        self._logger = package.api.Logger(package.api.Logger.ERROR)
        runtime = package.api.Runtime(self._logger)
        self._runtime = runtime
        self._engines = {name: self._load(runtime, folder, name) for name in self.manifest.engines}
        self._scratch_size = max(
            engine.get_device_memory_size_for_profile_v2(i)
            for engine in self._engines.values()
            for i in range(engine.num_optimization_profiles)
        )
        self._scratch = self.allocate(self._scratch_size)
        self._contexts: dict[tuple[str, int], Any] = {}
        self._cache = _RuntimeCache(package, self.manifest) if package.ahead_of_time else None
        self._staging: dict[object, tuple[int, int]] = {}
        self._runs: dict[int, int] = {}
        self._captured: dict[int, Any] = {}
        self._capture = self._cache is None

    def allocate(self, nbytes: int) -> int:
        return int(check(self._cuda.cudaMalloc(max(nbytes, 1))))

    def free(self, address: int) -> None:
        self._wait()
        check(self._cuda.cudaFree(address))

    def upload(self, address: int, array: NDArray[Any], slot: object) -> None:
        staging = self._staged(slot, array.nbytes)
        _host_array(staging, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(self._cuda.cudaMemcpyAsync(address, staging, array.nbytes, kind, self._stream))
        if slot is None:
            self._wait()

    def download(self, binding: Binding) -> NDArray[Any]:
        array = np.empty(binding.shape, binding.dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(
            self._cuda.cudaMemcpyAsync(array.ctypes.data, binding.address, array.nbytes, kind, self._stream)
        )
        self._wait()
        return array

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        if call in self._captured:
            check(self._cuda.cudaGraphLaunch(self._captured[call], self._stream))
            return
        context = self._bound(graph, bindings, host)
        if not context.execute_async_v3(int(self._stream)):
            raise RunError(f"graph {graph}: {self._package.name} could not run its engine")
        if call is not None and self._capture:
            self._runs[call] = self._runs.get(call, 0) + 1
            if self._runs[call] == 2:  # all that a first run defers is done by now
                captured = self._try_capture(graph, context)
                if captured is not None:
                    self._captured[call] = captured

    def on_host(self, graph: str) -> frozenset[str]:
        return frozenset(self.manifest.engines[graph].on_host)

    def forget(self) -> None:
        self._wait()
        for captured in self._captured.values():
            check(self._cuda.cudaGraphExecDestroy(captured))
        self._captured.clear()
        self._runs.clear()

    def event(self) -> Any:
        """A CUDA event behind everything on the stream."""
        event = check(self._cuda.cudaEventCreate())
        check(self._cuda.cudaEventRecord(event, self._stream))
        return event

    def seconds_between(self, first: Any, second: Any) -> float:
        """Device time between two events."""
        check(self._cuda.cudaEventSynchronize(second))
        return float(check(self._cuda.cudaEventElapsedTime(first, second))) / 1000

    def _load(self, runtime: Any, folder: Path, name: str) -> Any:
        path = folder / engine_file(name)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise InputError(
                f"{path}: {self._package.name} {self._package.version} cannot load this engine; "
                f"build it again with: hart-build --engine {folder.parent} "
                f"--backend {self._package.name} --force"
            )
        return engine

    def _bound(self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]]) -> Any:
        """A context of the right profile with every shape and address set."""
        spec = self.manifest.engines[graph]
        shapes = {t.name: bindings[t.name].shape for t in spec.inputs if t.name in bindings}
        try:
            profile = choose(spec.profiles, shapes)
        except ValueError as error:
            raise InputError(
                f"graph {graph}: no profile of its engine fits ({error}); build engines for this batch "
                f"with: hart-build --batch 1..N"
            ) from None
        context = self._context(graph, profile)
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        for name, binding in bindings.items():
            context.set_tensor_address(name, binding.address)
        for name, array in host.items():
            staging = self._staged((graph, profile, name), array.nbytes)
            _host_array(staging, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
            context.set_tensor_address(name, staging)
        return context

    def _context(self, graph: str, profile: int) -> Any:
        if (graph, profile) not in self._contexts:
            engine, trt = self._engines[graph], self._package.api
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            if self._cache is not None:
                config = self._cache.configure(engine)
                config.set_execution_context_allocation_strategy(strategy)
                context = engine.create_execution_context(config)
            else:
                context = engine.create_execution_context(strategy)
            if context is None:
                raise RunError(f"graph {graph}: {self._package.name} could not create its context")
            context.set_device_memory(self._scratch, self._scratch_size)
            context.set_optimization_profile_async(profile, int(self._stream))
            self._contexts[graph, profile] = context
        return self._contexts[graph, profile]

    def _try_capture(self, graph: str, context: Any) -> Any:
        """A CUDA graph of one execution, or None where it cannot be captured."""
        api = self._cuda
        mode = api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        recorded = None
        try:
            check(api.cudaStreamBeginCapture(self._stream, mode))
            done = context.execute_async_v3(int(self._stream))
            recorded = check(api.cudaStreamEndCapture(self._stream))
            if not done:
                raise RunError("the engine cannot be captured")
            return check(api.cudaGraphInstantiate(recorded, 0))
        except RunError as error:
            log.warning("graph %s runs without a CUDA graph: %s", graph, error)
            api.cudaGetLastError()  # a failed capture leaves its error behind
            return None
        finally:
            if recorded is not None:
                api.cudaGraphDestroy(recorded)

    def _staged(self, slot: object, nbytes: int) -> int:
        """Page-locked host memory of a slot, kept from picture to picture."""
        address, size = self._staging.get(slot, (0, 0))
        if size < nbytes:
            if address:
                self._wait()
                check(self._cuda.cudaFreeHost(address))
            address = int(check(self._cuda.cudaMallocHost(max(nbytes, 1))))
            self._staging[slot] = (address, nbytes)
        return address

    def _wait(self) -> None:
        check(self._cuda.cudaStreamSynchronize(self._stream))
        if self._cache is not None:
            self._cache.save()


class EngineBackend(PlannedBackend):
    """The loop on engines; it can time its own stream."""

    def __init__(self, bundle: Bundle, package: Package) -> None:
        self._engines = EngineExecutor(bundle, package)
        super().__init__(bundle, self._engines)

    def event(self) -> Any:
        """Place a mark behind everything that was submitted so far."""
        return self._engines.event()

    def seconds_between(self, first: Any, second: Any) -> float:
        """Wait for both marks; the time the device took from one to the other."""
        return self._engines.seconds_between(first, second)


class _RuntimeCache:
    """What TensorRT-RTX compiles for this GPU at first use, kept in the user's cache folder."""

    def __init__(self, package: Package, manifest: EngineManifest) -> None:
        self._trt = package.api
        identity = next(iter(manifest.engines.values())).file.sha256[:16]
        self._file = user_cache_path("hart-runtime") / f"{package.name}-{package.version}-{identity}.cache"
        self._cache: Any = None
        self._grown = False

    def configure(self, engine: Any) -> Any:
        """Runtime configuration of a context: shared cache, captured graphs."""
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._file.is_file():
                self._cache.deserialize(self._file.read_bytes())
        config.set_runtime_cache(self._cache)
        self._grown = True
        return config

    def save(self) -> None:
        """Write the cache if contexts were added; a folder that cannot be written costs only time."""
        if not self._grown:
            return
        self._grown = False
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_suffix(".partial")
            partial.write_bytes(bytes(self._cache.serialize()))
            partial.replace(self._file)


def _host_array(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Host memory as an array."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
