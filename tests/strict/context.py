"""Execution contexts of the played TensorRT: what they are told, and when they refuse to run."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.strict import arithmetic, sizes
from tests.strict.device import Refused, Stream, Work
from tests.strict.memory import ALIGNMENT, Span, array_at, find, holder
from tests.strict.plan import Plan, Tensor
from tests.strict.rules import BrokenRule

if TYPE_CHECKING:
    from tests.strict.tensorrt import StrictTensorRT

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
DTYPES |= {"INT8": "int8", "UINT8": "uint8"}
Shape = tuple[int, ...]


@dataclass(eq=False)
class State:
    """What work on a stream knows of its context, which it does not keep alive."""

    profile: int = 0
    shapes: dict[str, Shape] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    held: dict[str, Callable[[], bool]] = field(default_factory=dict)
    """For inputs on the host: whether their memory is still there."""
    scratch: tuple[int, int] = (0, 0)
    ran: set[object] = field(default_factory=set)
    """Shapes that it ran plainly with: whatever a first run puts off is done."""
    ignored: dict[tuple[str, str], str] = field(default_factory=dict)
    """Refusals that nobody looked at, by call and name."""
    last: object = None
    """What TensorRT-RTX has captured."""
    dead: bool = False


class IExecutionContext:
    _trt: StrictTensorRT

    def _setup(self, engine: Any, strategy: Any, config: Any) -> None:
        self._engine_ref, self._plan, self._logger = weakref.ref(engine), engine._plan, engine._logger
        self._session, self._strategy, self._device = engine._session, strategy, engine._device
        graphs = None if config is None else config._graphs
        self._cache = None if config is None else config._cache
        self._captures = graphs is not None and graphs.name == "WHOLE_GRAPH_CAPTURE"
        self._state = State()
        weakref.finalize(self, _died, self._trt, self._state).atexit = False

    @property
    def engine(self) -> Any:
        return self._engine_ref()

    @property
    def active_optimization_profile(self) -> int:
        return self._state.profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        call = "set_optimization_profile_async"
        with self._trt.strictly():
            stream = self._trt.cuda.stream(call, stream_handle)
            if not 0 <= profile_index < len(self._plan.profiles):
                return self._refuse(call, "", f"there is no profile {profile_index}")
            if stream.capture is not None or self._trt.cuda.in_flight(self._state):
                raise BrokenRule(22, call, "while the context is in flight, or its stream is capturing")
            if profile_index != self._state.profile:
                self._change(call)
                self._state.profile = profile_index
                self._state.shapes.clear()
            return self._accept(call, "")

    def set_input_shape(self, name: str, shape: Any) -> bool:
        call, wanted = "set_input_shape", tuple(int(n) for n in shape)
        with self._trt.strictly():
            ranges = self._plan.profiles[self._state.profile].get(name)
            if ranges is None or not self._is(name, is_input=True):
                return self._refuse(call, name, f"{name} is no input with a shape of its own")
            low, _, high = ranges
            if len(wanted) != len(low) or any(
                not a <= n <= b for a, n, b in zip(low, wanted, high, strict=True)
            ):
                number = self._state.profile
                return self._refuse(
                    call, name, f"{name}: {wanted} is not in {low} to {high} of profile {number}"
                )
            if self._state.shapes.get(name) != wanted:
                self._change(call)
                self._state.shapes[name] = wanted
            return self._accept(call, name)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        call, address = "set_tensor_address", int(memory)
        with self._trt.strictly():
            if not self._is(name):
                return self._refuse(call, name, f"{name} is no input or output")
            if name in self._plan.on_host:
                self._state.held[name] = self._host_memory(call, name, address)
            elif address % ALIGNMENT:
                raise BrokenRule(20, call, f"{name} at {address:#x}, which is no multiple of {ALIGNMENT}")
            if self._state.addresses.get(name) != address:
                self._change(call)
                self._state.addresses[name] = address
            return self._accept(call, name)

    def get_tensor_address(self, name: str) -> int:
        return self._state.addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> Any:
        known = self._state.shapes.get(name) or self._output_shapes().get(name)
        if known is None:
            known = tuple(n if isinstance(n, int) else -1 for n in self._tensor(name).shape)
        return self._trt.api.Dims(known)

    def infer_shapes(self) -> list[str]:
        return self._without_shape()

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self._without_shape()

    @property
    def device_memory(self) -> int:
        return self._state.scratch[0]

    @device_memory.setter
    def device_memory(self, value: int) -> None:
        self._set_scratch("device_memory", int(value), max(self._plan.scratch))

    def set_device_memory(self, memory: int, size: int) -> None:
        self._set_scratch("set_device_memory", int(memory), int(size))

    def update_device_memory_size_for_shapes(self) -> int:
        return self._plan.scratch[self._state.profile]

    def execute_async_v3(self, stream_handle: int) -> bool:
        call = "execute_async_v3"
        with self._trt.strictly():
            cuda, state = self._trt.cuda, self._state
            for (asked, _), why in state.ignored.items():
                raise BrokenRule(21, asked, f"returned False ({why}), and nobody looked")
            try:
                cuda.enter(call)
                stream = cuda.stream(call, stream_handle)
                if stream.device != self._device:
                    raise BrokenRule(6, call, "on a stream of another device than its engine's")
                missing = self._missing()
                if missing:
                    return self._fail(missing)
                host = {name: self._host_value(name) for name in self._plan.on_host}
                if wrong := [name for name, value in host.items() if not self._allowed(name, value)]:
                    return self._fail(f"{wrong[0]} is {host[wrong[0]].tolist()}, outside of the profile")
                work = self._work(call, stream, host)
                cuda.put(stream, work)
            except Refused as refused:
                return self._fail(f"Cuda Runtime ({refused.status.name})")
            if stream.capture is None:
                cuda.counts.executions += 1
                state.ran.add(self._signature())
                if self._cache is not None:
                    self._cache._run(f"{self._plan.tensors[-1].name} in profile {state.profile};".encode())
                self._capture_again()
            return True

    # What they need

    def _tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self._plan.tensors if tensor.name == name)

    def _is(self, name: str, is_input: bool | None = None) -> bool:
        return any(t.name == name and is_input in (None, t.is_input) for t in self._plan.tensors)

    def _refuse(self, call: str, name: str, why: str) -> bool:
        self._state.ignored[call, name] = why
        return self._fail(why)

    def _accept(self, call: str, name: str) -> bool:
        self._state.ignored.pop((call, name), None)
        return True

    def _fail(self, why: str) -> bool:
        self._trt.log(self._logger, "ERROR", f"IExecutionContext: {why}")
        return False

    def _change(self, call: str) -> None:
        """Raises BrokenRule if a graph that was captured from this context is still there."""
        if self._state in _captured(self._trt):
            raise BrokenRule(23, call, "changes a context that a captured graph was made from")

    def _set_scratch(self, call: str, address: int, size: int) -> None:
        with self._trt.strictly():
            if self._strategy.name != "USER_MANAGED":
                self._fail(f"{call} is for contexts that manage no memory of their own")
                return
            if address % ALIGNMENT:
                raise BrokenRule(20, call, f"scratch at {address:#x}, which is no multiple of {ALIGNMENT}")
            if self._state.scratch != (address, size):
                self._change(call)
                self._state.scratch = address, size

    def _signature(self) -> object:
        return self._state.profile, tuple(sorted(self._state.shapes.items()))

    def _capture_again(self) -> None:
        """TensorRT-RTX captures on its own, and again whenever an address or a shape is another one."""
        now = (self._signature(), tuple(sorted(self._state.addresses.items())))
        if self._captures and self._state.last not in (None, now):
            self._trt.cuda.counts.recaptures += 1
        self._state.last = now

    def _without_shape(self) -> list[str]:
        return [
            t.name
            for t in self._plan.tensors
            if t.is_input
            and t.name not in self._state.shapes
            and t.name not in self._plan.on_host
            and any(isinstance(n, str) for n in t.shape)
        ]

    def _missing(self) -> str:
        """Why it cannot run; empty if it can."""
        state = self._state
        if without := [t.name for t in self._plan.tensors if not state.addresses.get(t.name)]:
            return f"{without[0]} has no address"
        if shapeless := self._without_shape():
            return f"{shapeless[0]} has no shape"
        needed = self._plan.scratch[state.profile]
        if self._strategy.name == "USER_MANAGED" and needed:
            address, size = state.scratch
            if not address:
                return f"{needed} bytes of device memory were not given"
            if size < needed:
                raise BrokenRule(
                    20, "execute_async_v3", f"scratch of {size} bytes, the profile asks for {needed}"
                )
        return ""

    def _output_shapes(self) -> dict[str, Shape]:
        """Of those outputs whose shape follows from the inputs' shapes."""
        shapes = {
            t.name: self._state.shapes.get(t.name) or tuple(n for n in t.shape if isinstance(n, int))
            for t in self._plan.tensors
            if t.is_input
        }
        known = _known(self._plan, tuple(sorted(shapes.items())))
        return {name: shape for name, shape in known if shape is not None}

    def _host_memory(self, call: str, name: str, address: int) -> Callable[[], bool]:
        cuda = self._trt.cuda
        if find(cuda.memory.values(), address) is not None:
            raise BrokenRule(24, call, f"{name} is read on the host, and lies on the device")
        locked = find(cuda.pinned.values(), address)
        if locked is not None:
            return lambda: not locked.freed
        array = holder(address, 1)
        if array is None:
            raise BrokenRule(24, call, f"nobody holds the host memory of {name}")
        kept = weakref.ref(array)
        return lambda: kept() is not None

    def _host_value(self, name: str) -> NDArray[Any]:
        if not self._state.held[name]():
            raise BrokenRule(24, "execute_async_v3", f"the host memory of {name} is gone")
        tensor = self._tensor(name)
        shape = tuple(n for n in tensor.shape if isinstance(n, int))
        return array_at(self._state.addresses[name], shape, np.dtype(DTYPES[tensor.dtype])).copy()

    def _allowed(self, name: str, value: NDArray[Any]) -> bool:
        ranges = self._plan.values[self._state.profile].get(name)
        if ranges is None:
            return True
        low, _, high = (np.array(r) for r in ranges)
        return bool(((low <= value.reshape(-1)) & (value.reshape(-1) <= high)).all())

    def _work(self, call: str, stream: Stream, host: dict[str, NDArray[Any]]) -> Work:
        state, cuda = self._state, self._trt.cuda
        capturing, signature = stream.capture is not None, self._signature()
        if capturing and signature not in state.ran:
            raise BrokenRule(26, call, "the first run with these shapes may allocate, and is captured")
        made = self._output_shapes()
        reads, writes = {}, {}
        for tensor in self._plan.tensors:
            if tensor.name in host:
                continue
            fixed = tuple(n for n in tensor.shape if isinstance(n, int))
            shape = state.shapes.get(tensor.name) or made.get(tensor.name)
            if shape is None:
                shape = fixed if len(fixed) == len(tensor.shape) else None
            dtype = np.dtype(DTYPES[tensor.dtype])
            nbytes = 1 if shape is None else int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            span = cuda.span(f"{call}: {tensor.name}", state.addresses[tensor.name], nbytes)
            if tensor.is_input:
                reads[tensor.name] = span, shape or (), dtype
            else:
                writes[tensor.name] = span
        used: tuple[Span, ...] = tuple(writes.values())
        alone: tuple[object, ...] = (state,)
        address = state.scratch[0]
        if needed := self._plan.scratch[state.profile] if address else 0:
            used += (cuda.span(f"{call}: scratch", address, needed),)
            alone += (("scratch", address),)
        session, names = self._session, tuple(self._plan.on_host)
        # A graph keeps work, and work must not keep the context, whose end is to be noticed.
        value_now = functools.partial(_value_now, state, {n: self._tensor(n) for n in names})

        def prepare() -> Callable[[], None]:
            if state.dead:
                raise BrokenRule(27, "cuda graph", "its context is gone")
            if capturing and any((value_now(name) != host[name]).any() for name in names):
                raise BrokenRule(24, "cuda graph", "an input on the host is not what it was when captured")

            def run() -> None:
                inputs = {
                    name: array_at(span.start, shape, dtype) for name, (span, shape, dtype) in reads.items()
                }
                for name, array in arithmetic.compute(session, {**inputs, **host}).items():
                    span = writes[name]
                    if not span.allocation.holds(span.start, array.nbytes):
                        raise BrokenRule(6, call, f"{name} is written past its allocation")
                    array_at(span.start, array.shape, array.dtype)[...] = array

            return run

        return Work(call, prepare, tuple(s for s, _, _ in reads.values()), used, alone)


def _value_now(state: State, tensors: dict[str, Tensor], name: str) -> NDArray[Any]:
    if not state.held[name]():
        raise BrokenRule(24, "cuda graph", f"the host memory of {name} is gone")
    shape = tuple(n for n in tensors[name].shape if isinstance(n, int))
    return array_at(state.addresses[name], shape, np.dtype(DTYPES[tensors[name].dtype]))


def _captured(trt: StrictTensorRT) -> list[object]:
    """All that graphs, and captures that are not at their end, were made from."""
    cuda = trt.cuda
    works = [work for works in (*cuda.graphs.values(), *cuda.launchable.values()) for work in works]
    works += [work for s in cuda.streams.values() if s.capture is not None for work in s.capture.works]
    return [thing for work in works for thing in work.alone]


def _died(trt: StrictTensorRT, state: State) -> None:
    state.dead = True
    if trt.cuda.sticky is not None:
        return  # nothing can be given back to a lost device
    if state in _captured(trt):
        trt.cuda.note(BrokenRule(27, "the end", "a context died before a graph that was captured from it"))
    if trt.cuda.in_flight(state):
        trt.cuda.note(BrokenRule(27, "the end", "a context died while it was in flight"))


@functools.lru_cache(64)
def _graph(content: bytes) -> tuple[Any, dict[str, int]]:
    """A graph without its weights, and its types."""
    model = onnx.load_model_from_string(content)
    types = arithmetic.element_types(model)
    for initializer in model.graph.initializer:
        if len(initializer.raw_data) > 1024:
            initializer.ClearField("raw_data")
            initializer.data_location = onnx.TensorProto.EXTERNAL
            initializer.external_data.add(key="location", value="none")
    return model, types


_shapes: dict[tuple[int, object], tuple[tuple[str, Shape | None], ...]] = {}


def _known(plan: Plan, shapes: tuple[tuple[str, Shape], ...]) -> tuple[tuple[str, Shape | None], ...]:
    """Shapes of a plan's outputs, as far as they follow from these."""
    key = hash(plan.model), shapes
    if key not in _shapes:
        model, types = _graph(plan.model)
        known = sizes.tensors(model, dict(shapes), types)
        _shapes[key] = tuple((v.name, known[v.name].shape) for v in model.graph.output if v.name in known)
    return _shapes[key]
