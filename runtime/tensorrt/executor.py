"""Runs engines: one scratch allocation for all of them, captured graphs."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, RunError, parameter
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.cuda import CudaMemory
from hart_runtime.runtime.memory.executor import Binding
from hart_runtime.runtime.memory.gpu import check
from hart_runtime.runtime.tensorrt.limits import EngineLimits
from hart_runtime.runtime.tensorrt.log import last_error, make_logger
from hart_runtime.runtime.tensorrt.manifest import build_command, engine_file, find_engines, graphs_of
from hart_runtime.runtime.tensorrt.package import Package
from hart_runtime.runtime.tensorrt.profiles import choose
from hart_runtime.runtime.tensorrt.runtime_cache import RuntimeCache

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    """A planned call: the context that is its own, and what was captured from it."""

    context: Any
    runs: int = 0
    captured: Any = None
    """A CUDA graph. It is a picture of its context, which never changes again."""


@dataclass(eq=False)
class _Alive:
    """What TensorRT made, given up in an order that it can take: graphs, contexts, engines, the runtime."""

    api: Any
    runtime: list[Any] = field(default_factory=list)
    engines: dict[str, Any] = field(default_factory=dict)
    contexts: dict[tuple[str, int], Any] = field(default_factory=dict)
    """By graph and profile, for runs that are not planned."""
    calls: dict[int, _Call] = field(default_factory=dict)

    def drop(self, number: int) -> None:
        """Give up one call, if it is there."""
        call = self.calls.pop(number, None)
        if call is not None and call.captured is not None:
            self.api.cudaGraphExecDestroy(call.captured)

    def close(self) -> None:
        for number in list(self.calls):
            self.drop(number)
        self.contexts.clear()
        self.engines.clear()
        self.runtime.clear()


class EngineExecutor(CudaMemory):
    """An :class:`hart_runtime.runtime.memory.executor.Executor` on a GPU.

    Every planned call has a context of its own, and is run plainly twice, captured as a CUDA graph after
    the second run and replayed from then on. TensorRT-RTX captures on its own.
    """

    device = "cuda"
    writes_all = True

    def __init__(self, bundle: Bundle, package: Package, index: int = 0, tf32: bool = False) -> None:
        super().__init__(index)
        folder, self.manifest = find_engines(bundle, package, self.gpu)
        if tf32 and not self.manifest.options.tf32:
            raise InputError(
                f"{parameter('tf32', True)}: {folder} was built without it; build the engines again with: "
                f"{build_command(bundle.folder, package.name)} {parameter('tf32', True)}"
            )
        self.limits = EngineLimits(folder, self.manifest, bundle.manifest)
        self._bundle, self._folder, self._package = bundle, folder, package
        self.name = package.name
        self._log = make_logger(package.api)
        self._alive = _Alive(self._cuda, [package.api.Runtime(self._log)])
        self.closing.append(self._alive.close)
        for name in graphs_of(bundle.manifest, self.manifest.options.keep):
            self._alive.engines[name] = self._load(bundle, folder, name)
        for warning in dict.fromkeys(self._log.warnings):
            log.warning("%s: %s", folder, warning)
        self._scratch_size = max(map(_scratch_of, self._alive.engines.values()))
        self._scratch = self.allocate(self._scratch_size)
        self._cache: RuntimeCache | None = None
        if package.ahead_of_time:
            self._cache = RuntimeCache(package, self.manifest, self._alive.engines)
            self.closing.insert(0, self._cache.close)

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        self._here()
        if graph not in self._alive.engines:
            self._open(graph)
        if call is None:
            self._run(graph, self._beside(graph, bindings, host))
            return
        planned = self._alive.calls.get(call)
        if planned is None:
            slots = {name: (call, name) for name in host}
            planned = _Call(self._bound(graph, bindings, host, slots, None))
            self._alive.calls[call] = planned
        if planned.captured is not None:
            check(self._cuda.cudaGraphLaunch(planned.captured, self._stream))
            return
        self._run(graph, planned.context)
        planned.runs += 1
        if planned.runs == 2 and self._cache is None:  # all that a first run defers is done by now
            planned.captured = self._try_capture(graph, planned.context)

    def on_host(self, graph: str) -> frozenset[str]:
        return frozenset(self.manifest.engines[graph].on_host)

    def forget(self, calls: range) -> None:
        self._wait()
        for call in calls:
            self._alive.drop(call)
        self._forget_staged(calls)

    def _open(self, graph: str) -> None:
        """Load the engine of a graph that most drawings do without."""
        engine = self._load(self._bundle, self._folder, graph)
        self._alive.engines[graph] = engine
        if (wanted := _scratch_of(engine)) > self._scratch_size:  # contexts that there are keep theirs
            self._scratch, self._scratch_size = self.allocate(wanted), wanted

    def _load(self, bundle: Bundle, folder: Path, name: str) -> Any:
        """Deserialize an engine from its file, which is mapped and not read as a whole."""
        path = folder / engine_file(name)
        with bundle.seal.open(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            view = memoryview(plan)
            try:
                engine = self._alive.runtime[0].deserialize_cuda_engine(view)
            finally:
                view.release()
        if engine is None:
            mend = build_command(folder.parent, self._package.name, force=True)
            raise InputError(
                f"{path}: {self._package.name} {self._package.version} cannot load this engine "
                f"({last_error(self._log)}); build it again with: {mend}"
            )
        return engine

    def _run(self, graph: str, context: Any) -> None:
        if not context.execute_async_v3(int(self._stream)):
            raise RunError(f"graph {graph}: {self.name} could not run its engine ({last_error(self._log)})")

    def _beside(self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]]) -> Any:
        """A context for a run that is not planned: one a profile, which nothing captured keeps."""
        if host:
            self._wait()  # the last run may still read what lay there
        slots = {name: (graph, name) for name in host}
        profile = self._profile(graph, bindings, host)
        context = self._alive.contexts.get((graph, profile))
        context = self._bound(graph, bindings, host, slots, context)
        self._alive.contexts[graph, profile] = context
        return context

    def _bound(
        self,
        graph: str,
        bindings: Mapping[str, Binding],
        host: Mapping[str, NDArray[Any]],
        slots: Mapping[str, tuple[Any, ...]],
        context: Any,
    ) -> Any:
        """A context, a new one if there is none, with every shape and address set."""
        if context is None:
            context = self._context(graph, self._profile(graph, bindings, host))
        spec = self.manifest.engines[graph]
        for tensor in spec.inputs:
            if tensor.name in bindings:
                shape = bindings[tensor.name].shape
                self._accepted(graph, context.set_input_shape(tensor.name, shape), tensor.name)
        for name, binding in bindings.items():
            self._accepted(graph, context.set_tensor_address(name, binding.address), name)
        for name, array in host.items():
            address = self._staged(slots[name], array)
            self._accepted(graph, context.set_tensor_address(name, address), name)
        return context

    def _profile(self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]]) -> int:
        """Number of the profile that holds the shapes of a run."""
        spec = self.manifest.engines[graph]
        shapes = {t.name: bindings[t.name].shape for t in spec.inputs if t.name in bindings}
        values = {name: tuple(array.ravel().tolist()) for name, array in host.items()}
        try:
            return choose(spec.profiles, shapes, values)
        except ValueError as error:
            raise InputError(
                f"graph {graph}: no profile of its engine fits ({error}); build engines for this batch "
                f"with: hart-build `batch=1..N`"
            ) from None

    def _context(self, graph: str, profile: int) -> Any:
        engine, trt = self._alive.engines[graph], self._package.api
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is not None:
            config = self._cache.configure(engine)
            config.set_execution_context_allocation_strategy(strategy)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise RunError(
                f"graph {graph}: {self.name} could not create its context ({last_error(self._log)})"
            )
        context.set_device_memory(self._scratch, self._scratch_size)
        chosen = context.set_optimization_profile_async(profile, int(self._stream))
        self._accepted(graph, chosen, f"profile {profile}")
        return context

    def _accepted(self, graph: str, answer: bool, what: str) -> None:
        if not answer:
            raise RunError(f"graph {graph}: {self.name} refuses {what} ({last_error(self._log)})")

    def _try_capture(self, graph: str, context: Any) -> Any:
        """A CUDA graph of one execution, or None where it cannot be captured."""
        api = self._cuda
        recorded: Any = None
        ended: tuple[Any, ...] = ()
        try:
            mode = api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            check(api.cudaStreamBeginCapture(self._stream, mode))
            try:
                done = context.execute_async_v3(int(self._stream))
            finally:  # whatever happened: the stream can do nothing else until then
                ended = api.cudaStreamEndCapture(self._stream)
                recorded = ended[1] if int(ended[0]) == 0 else None
            check(ended)
            if not done:
                raise RunError(f"the engine cannot be captured ({last_error(self._log)})")
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


def _scratch_of(engine: Any) -> int:
    """Bytes that an engine needs while it runs, with any of its profiles."""
    sizes = map(engine.get_device_memory_size_for_profile_v2, range(engine.num_optimization_profiles))
    return max(sizes)
