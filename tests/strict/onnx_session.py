"""Sessions of the played ONNX Runtime: what they are bound to, how they run, are captured and use memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.strict import arithmetic, sizes
from tests.strict.cuda import CudaRuntime
from tests.strict.cuda_names import cudaStreamCaptureMode
from tests.strict.device import Refused, Stream, Work
from tests.strict.memory import Span, array_at
from tests.strict.placement import place
from tests.strict.rules import BrokenRule

if TYPE_CHECKING:
    from tests.strict.onnx_gpu import StrictOnnx

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
NOT_CAPTURED = -1
Shape = tuple[int, ...]


class Arena:
    """Memory that a session (or all of them) keeps for what it computes."""

    def __init__(self, strict: StrictOnnx, device: int, exact: bool, owner: object = None) -> None:
        self._strict, self._device, self._exact = strict, device, exact
        self._owner = None if owner is None else weakref.ref(owner)
        self._nbytes = self._last = 0

    def need(self, nbytes: int) -> None:
        """Grow to this size: by what is missing, or by twice as much as the last time."""
        missing = nbytes - self._nbytes
        if missing > 0:
            self._last = missing if self._exact else max(1 << (missing - 1).bit_length(), 2 * self._last)
            self.take(self._last)
            self._nbytes += self._last

    def take(self, nbytes: int) -> None:
        owner = None if self._owner is None else self._owner()
        try:
            self._strict.cuda.reserve(owner, nbytes, self._device)
        except Refused:
            raise RuntimeError(f"Failed to allocate memory for requested buffer of size {nbytes}") from None
        self._strict.count("an arena", nbytes)


class Bound(NamedTuple):
    """An input or output: on the device, or an array of the host."""

    shape: Shape
    dtype: np.dtype[Any]
    address: int
    array: NDArray[Any] | None = None


@dataclass(eq=False)
class Binding:
    """What a session is run on."""

    session: Session
    inputs: dict[str, Bound] = field(default_factory=dict)
    outputs: dict[str, Bound] = field(default_factory=dict)

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Any, buffer_ptr: int
    ) -> None:
        bound = Bound(tuple(shape), np.dtype(element_type), int(buffer_ptr))
        if device_type == "cpu":
            bound = bound._replace(array=array_at(bound.address, bound.shape, bound.dtype))
        self.inputs[name] = self.session.checked(name, bound, device_type, device_id)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Any = None,
        buffer_ptr: int | None = None,
    ) -> None:
        if device_type == "cpu" or buffer_ptr is None:
            raise NotImplementedError("outputs are played at addresses of the device alone")
        bound = Bound(tuple(shape), np.dtype(element_type), int(buffer_ptr))
        self.outputs[name] = self.session.checked(name, bound, device_type, device_id)

    def bind_cpu_input(self, name: str, arr_on_cpu: NDArray[Any]) -> None:
        bound = Bound(arr_on_cpu.shape, arr_on_cpu.dtype, 0, arr_on_cpu)
        self.inputs[name] = self.session.checked(name, bound, "cpu", 0)


class Session:
    """An inference session on CUDA."""

    def __init__(self, strict: StrictOnnx, path: Path, options: Any, given: dict[str, str]) -> None:
        self._strict, self._cuda, self._given, self._name = strict, strict.cuda, given, path.stem
        self._api = CudaRuntime(strict.cuda)
        self._model = onnx.load(path, load_external_data=False)
        self._types = arithmetic.element_types(self._model)
        self._placement = place(self._model, self._types)
        self._captures = given["enable_cuda_graph"] == "1"
        if self._captures and not self._placement.capturable:
            raise RuntimeError(
                "This session cannot use the graph capture feature as requested by the user as all compute "
                f"graph nodes have not been partitioned to the {CUDA}"
            )
        self._session = arithmetic.session(path, given["use_tf32"] == "1")
        self._graphs: dict[int, tuple[object, Any]] = {}
        self._released: set[int] = set()
        self._patterns: dict[object, bool] = {}
        device, stream = int(given["device_id"]), int(given["user_compute_stream"])
        self._own = None if stream else self._api.cudaStreamCreateWithFlags(1)[1]
        self._stream = self._own or stream
        keeps_patterns = options is None or options.enable_mem_pattern
        self._pattern = bool(keeps_patterns)
        shares = _entry(options, "session.use_env_allocators") == "1"
        exact = given["arena_extend_strategy"] == "kSameAsRequested"
        own = Arena(strict, device, exact, self)
        self._arena = strict.shared if shares and strict.shared else own
        weights = sum(
            int(np.prod(i.dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(i.data_type).itemsize
            for i in self._model.graph.initializer
        )
        own.take(weights)
        gone = weakref.finalize(self, _given_back, self._api, self._graphs, self._own)
        gone.atexit = False

    # What the real one has

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {CUDA: dict(self._given), CPU: {}}

    def get_input_memory_infos(self) -> list[Any]:
        places = self._placement.inputs
        return [SimpleNamespace(name=places[v.name].title()) for v in self._session.get_inputs()]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [*self._model.graph.node]
        there = {*self._placement.on_the_cpu}
        parts = {
            CPU: [n for number, n in enumerate(nodes) if number in there],
            CUDA: [n for number, n in enumerate(nodes) if number not in there],
        }
        return [SimpleNamespace(ep_name=name, get_nodes=_giver(part)) for name, part in parts.items() if part]

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, iobinding: Binding, run_options: Any = None) -> None:
        call = f"run of {self._name}"
        with self._cuda.lock:
            try:
                self._cuda.enter("run_with_iobinding")
                self._run(call, iobinding, run_options)
            except Refused as refused:
                raise RuntimeError(f"CUDA failure {int(refused.status)}: {refused.status.name}") from None
            except BrokenRule as broken:
                self._cuda.note(broken)
                raise

    def release_captured_graph(self, graph_annotation_id: int = 0) -> None:
        if graph_annotation_id in self._graphs:
            self._released.add(graph_annotation_id)
            self._api.cudaGraphExecDestroy(self._graphs.pop(graph_annotation_id)[1])

    # How it runs

    def checked(self, name: str, bound: Bound, device_type: str, device_id: int) -> Bound:
        """A binding that the graph takes."""
        known = {v.name: v for v in (*self._session.get_inputs(), *self._session.get_outputs())}
        if name not in known:
            raise RuntimeError(f"Invalid name: {name}")
        if bound.dtype != arithmetic.dtype_of(known[name]):
            raise RuntimeError(f"{name}: expected {arithmetic.dtype_of(known[name])}, found {bound.dtype}")
        fixed = known[name].shape
        if len(fixed) != len(bound.shape) or any(
            isinstance(n, int) and n != m for n, m in zip(fixed, bound.shape, strict=True)
        ):
            raise RuntimeError(f"Got invalid dimensions for {name}: {bound.shape}, expected {fixed}")
        if device_type != "cpu" and device_id != int(self._given["device_id"]):
            raise BrokenRule(6, "bind", f"{name} lies on device {device_id}, the session is on another")
        return bound

    def _run(self, call: str, binding: Binding, run_options: Any) -> None:
        stream = self._cuda.stream(call, self._stream)
        if stream.device != int(self._given["device_id"]):
            raise BrokenRule(6, call, "on a stream of another device than the session's")
        number = int(_entry(run_options, "gpu_graph_id") or 0) if self._captures else NOT_CAPTURED
        work = self._work(call, stream, binding)
        if number == NOT_CAPTURED:
            self._prepare_arena(binding)
            self._cuda.put(stream, work)
            self._cuda.counts.executions += 1
            self._count_copies(call, stream)
        else:
            self._run_captured(call, number, stream, binding, work)
        if _entry(run_options, "disable_synchronize_execution_providers") != "1":
            self._cuda.wait(f"{call} without disable_synchronize_execution_providers", stream)

    def _run_captured(self, call: str, number: int, stream: Stream, binding: Binding, work: Work) -> None:
        host = tuple(b.array.tobytes() for b in binding.inputs.values() if b.array is not None)
        places = (*binding.inputs.items(), *binding.outputs.items())
        signature = (tuple((name, b.shape, b.address) for name, b in places), host)
        if number in self._graphs:
            if self._graphs[number][0] != signature:
                raise BrokenRule(
                    35, call, f"graph {number} was captured with other shapes, addresses or values"
                )
            self._api.cudaGraphLaunch(self._graphs[number][1], self._stream)
            return
        if number in self._released:
            raise BrokenRule(35, call, f"graph {number} was another call's before")
        if any(a.overlaps(b) for a in work.writes for b in work.reads):
            raise BrokenRule(
                36, call, "runs twice before it is captured, and its outputs overwrite its inputs"
            )
        self._prepare_arena(binding)
        self._cuda.put(stream, work)
        self._cuda.counts.executions += 1
        _ok(self._api.cudaStreamBeginCapture(self._stream, cudaStreamCaptureMode.cudaStreamCaptureModeGlobal))
        self._cuda.put(stream, work)
        graph = _ok(self._api.cudaStreamEndCapture(self._stream))
        try:
            launchable = _ok(self._api.cudaGraphInstantiate(graph, 0))
        finally:
            self._api.cudaGraphDestroy(graph)
        self._graphs[number] = signature, launchable
        self._api.cudaGraphLaunch(launchable, self._stream)

    def _work(self, call: str, stream: Stream, binding: Binding) -> Work:
        named = {v.name for v in self._session.get_inputs()}
        if missing := named - set(binding.inputs):
            raise RuntimeError(f"Missing inputs: {', '.join(sorted(missing))}")
        host, reads = {}, {}
        for name, bound in binding.inputs.items():
            if bound.array is not None:
                host[name] = bound.array.copy()
                if self._placement.inputs[name] != "cpu":
                    self._cuda.counts.uploads += 1
                    self._cuda.counts.upload_bytes += bound.array.nbytes
                continue
            reads[name] = self._span(call, bound), bound
            if self._placement.inputs[name] == "cpu":
                self._copy_back(call, stream, int(np.prod(bound.shape)) * bound.dtype.itemsize)
        writes = {name: (self._span(call, bound), bound) for name, bound in binding.outputs.items()}
        session = self._session

        def run() -> None:
            inputs = {name: array_at(span.start, b.shape, b.dtype) for name, (span, b) in reads.items()}
            for name, array in arithmetic.compute(session, {**inputs, **host}).items():
                if name not in writes:
                    continue
                span, bound = writes[name]
                if array.shape != bound.shape:
                    raise BrokenRule(6, call, f"{name} has shape {array.shape}, bound is {bound.shape}")
                array_at(span.start, array.shape, array.dtype)[...] = array

        def prepare() -> Callable[[], None]:
            return run

        return Work(
            call,
            prepare,
            tuple(s for s, _ in reads.values()),
            tuple(s for s, _ in writes.values()),
            (session,),
        )

    def _span(self, call: str, bound: Bound) -> Span:
        nbytes = int(np.prod(bound.shape, dtype=np.int64)) * bound.dtype.itemsize
        return self._cuda.span(call, bound.address, nbytes)

    def _copy_back(self, call: str, stream: Stream, nbytes: int) -> None:
        """A copy to the host in the middle of a run, which somebody waits for."""
        if self._cuda.quiet:
            raise BrokenRule(38, call, "copies from the device before the picture is done")
        self._cuda.counts.downloads += 1
        self._cuda.counts.download_bytes += nbytes
        self._cuda.wait(f"{call}: a copy to the host", stream)

    def _count_copies(self, call: str, stream: Stream) -> None:
        for _ in range(self._placement.to_host):
            self._copy_back(call, stream, 8)
        self._cuda.counts.uploads += self._placement.to_device

    def _prepare_arena(self, binding: Binding) -> None:
        shapes = {name: bound.shape for name, bound in binding.inputs.items()}
        key = tuple(sorted(shapes.items()))
        known = sizes.tensors(self._model, shapes, self._types) if key not in self._patterns else {}
        needed = sizes.peak(self._model, known)
        self._arena.need(needed)
        if self._pattern and self._patterns.get(key) is False:
            needed = sizes.peak(self._model, sizes.tensors(self._model, shapes, self._types))
            self._arena.take(needed)  # a block for these shapes, beside what is there
        self._patterns[key] = key in self._patterns


def _giver(nodes: list[Any]) -> Callable[[], list[Any]]:
    return lambda: nodes


def _entry(options: Any, name: str) -> str | None:
    """Of session or run options."""
    for get in ("get_run_config_entry", "get_session_config_entry"):
        if hasattr(options, get):
            try:
                return str(getattr(options, get)(name))
            except RuntimeError:
                return None
    return None


def _ok(answer: tuple[Any, ...]) -> Any:
    if answer[0]:
        raise Refused(answer[0])
    return answer[1] if len(answer) > 1 else None


def _given_back(api: CudaRuntime, graphs: dict[int, tuple[object, Any]], stream: Any) -> None:
    for _, launchable in graphs.values():
        api.cudaGraphExecDestroy(launchable)
    if stream is not None:
        api.cudaStreamDestroy(stream)
