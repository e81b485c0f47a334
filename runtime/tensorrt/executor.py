"""Runs engines: one scratch allocation for all of them, captured graphs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from platformdirs import user_cache_path

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.cuda import CudaMemory, check
from hart_runtime.runtime.memory.executor import Binding
from hart_runtime.runtime.memory.gpu import present_gpu
from hart_runtime.runtime.tensorrt.limits import EngineLimits
from hart_runtime.runtime.tensorrt.manifest import EngineManifest, build_command, engine_file, find_engines
from hart_runtime.runtime.tensorrt.package import Package
from hart_runtime.runtime.tensorrt.profiles import choose

log = logging.getLogger(__name__)


class EngineExecutor(CudaMemory):
    """An :class:`hart_runtime.runtime.memory.executor.Executor` on the first GPU.

    Every planned call is run plainly twice, captured as a CUDA graph with the second run and
    replayed from then on. TensorRT-RTX captures on its own.
    """

    device = "cuda"

    def __init__(self, bundle: Bundle, package: Package) -> None:
        super().__init__()
        gpu = present_gpu()
        assert gpu is not None, "the memory is on it"
        folder, self.manifest = find_engines(bundle, package, gpu)
        self.limits = EngineLimits(folder, self.manifest, bundle.manifest)
        self._package = package
        self.name = package.name
        self._logger = package.api.Logger(package.api.Logger.ERROR)
        runtime = package.api.Runtime(self._logger)
        self._runtime = runtime
        self._engines = {name: self._load(runtime, folder, name) for name in bundle.manifest.graphs}
        self._scratch_size = max(
            engine.get_device_memory_size_for_profile_v2(i)
            for engine in self._engines.values()
            for i in range(engine.num_optimization_profiles)
        )
        self._scratch = self.allocate(self._scratch_size)
        self._contexts: dict[tuple[str, int], Any] = {}
        self._cache = _RuntimeCache(package, self.manifest, self._engines) if package.ahead_of_time else None
        self._runs: dict[int, int] = {}
        self._captured: dict[int, Any] = {}
        self._capture = self._cache is None

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

    def forget(self, calls: range) -> None:
        self._wait()
        for call in calls:
            self._runs.pop(call, None)
            if captured := self._captured.pop(call, None):
                check(self._cuda.cudaGraphExecDestroy(captured))

    def _load(self, runtime: Any, folder: Path, name: str) -> Any:
        path = folder / engine_file(name)
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            mend = build_command(folder.parent, self._package.name, force=True)
            raise InputError(
                f"{path}: {self._package.name} {self._package.version} cannot load this engine; "
                f"build it again with: {mend}"
            )
        return engine

    def _bound(self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]]) -> Any:
        """A context of the right profile with every shape and address set."""
        spec = self.manifest.engines[graph]
        shapes = {t.name: bindings[t.name].shape for t in spec.inputs if t.name in bindings}
        values = {name: tuple(array.ravel().tolist()) for name, array in host.items()}
        try:
            profile = choose(spec.profiles, shapes, values)
        except ValueError as error:
            raise InputError(
                f"graph {graph}: no profile of its engine fits ({error}); build engines for this batch "
                f"with: hart-build `batch=1..N`"
            ) from None
        context = self._context(graph, profile)
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        for name, binding in bindings.items():
            context.set_tensor_address(name, binding.address)
        for name, array in host.items():
            context.set_tensor_address(name, self._staged((graph, profile, name), array))
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

    def _wait(self) -> None:
        super()._wait()
        if self._cache is not None:
            self._cache.save()


class _RuntimeCache:
    """What TensorRT-RTX compiles for this GPU at first use, kept in the user's cache folder."""

    def __init__(self, package: Package, manifest: EngineManifest, engines: Iterable[str]) -> None:
        self._trt = package.api
        hashes = "".join(manifest.engines[name].file.identity for name in engines)
        identity = hashlib.sha256(hashes.encode()).hexdigest()[:16]
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
