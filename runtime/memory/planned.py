"""A backend whose memory is planned before each drawing, over any executor of graphs.

A drawing's n-th run is its plan's n-th call, so every tensor of every picture lies where it lay in the
picture before: an executor can capture a call once and replay it. Runs beside drawings (previews, the
text encoder) get memory of their own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.backends.backend import Backend, Lease, Outputs, Value, Values, first_half, joined
from hart_runtime.runtime.backends.names import CPU
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.memory.executor import Binding, Executor
from hart_runtime.runtime.memory.plan import Plan, PlannedCall, View, half_view, make_plan, split_view
from hart_runtime.runtime.program import Program, Run, same
from hart_runtime.runtime.shapes import Shape, shape_of, solve
from hart_runtime.runtime.spec import TensorSpec

MOST_PLANS = 3
"""Plans that are kept, each with what was captured for its calls."""
MOST_IDLE = 256 << 20
"""Bytes outside of plans that wait for a tensor of their size; what is more goes back to the system."""


@dataclass(eq=False)
class Laid:
    """A plan whose calls have numbers and whose constants have a place."""

    plan: Plan
    calls: range
    """Numbers of its calls among all that the backend ever planned."""
    constants: int
    """Address."""
    uploaded: dict[tuple[int, str], NDArray[Any]] = field(default_factory=dict)
    """What lies there, by call and input."""
    bound: dict[int, dict[str, Binding]] = field(default_factory=dict)
    """Where each call's tensors lie, as far as calls were made; until the arena moves."""


class PlannedBackend(Backend):
    """Runs the loop's graphs at planned addresses."""

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        """Raises InputError if a file of the bundle is not what was sealed."""
        bundle.seal.check()  # by now the executor has opened its files
        self.manifest = bundle.manifest
        self.executor = executor
        self.name, self.device, self.limits = executor.name, executor.device, executor.limits
        self._graphs = bundle.manifest.graphs
        self._plans: dict[object, Laid] = {}
        self._planned = 0
        self._arena, self._size = 0, 0
        self._turn, self._owner = threading.Lock(), 0
        self._one_run = threading.RLock()
        self._process = os.getpid()
        self._idle: dict[int, list[int]] = {}

    @contextlib.contextmanager
    def begin(self, program: Program) -> Iterator[Lease]:
        me = threading.get_ident()
        if self._owner == me:
            raise InputError(
                "a picture is being drawn here already, by the same thread: finish or close that drawing "
                "before another one begins (a callback cannot draw; load a second pipeline for that)"
            )
        self._refuse_after_fork()
        with self._turn:
            self._owner = me
            try:
                lease = _Lease(self, self._laid(program))
                try:
                    yield lease
                finally:
                    lease.over = True
            finally:
                self._owner = 0

    def run(self, run: Run, inputs: Values) -> Outputs:
        """A run with memory of its own."""
        self._refuse_after_fork()
        spec = self._graphs[run.graph]
        with self._one_run:
            stays = self.executor.on_host(run.graph)
            host = {t.name: _typed(inputs[t.name], t) for t in spec.inputs if t.name in stays}
            held = {t.name: self._bound(inputs[t.name], t) for t in spec.inputs if t.name not in stays}
            bindings = {name: _binding(value) for name, value in held.items()}
            shapes = {name: b.shape for name, b in bindings.items()} | {k: v.shape for k, v in host.items()}
            dims = solve(spec.inputs, shapes)
            outputs: Outputs = {t.name: self._new(shape_of(t, dims), np.dtype(t.dtype)) for t in spec.outputs}
            bindings |= {name: own.binding for name, own in outputs.items()}
            self.executor.execute(run.graph, bindings, host, None)
        return outputs

    def _refuse_after_fork(self) -> None:
        """A process that was forked has none of the threads that graphs ran on, nothing of a GPU, and may
        have locks whose owners are not there. Whoever waits for any of these waits for ever.

        Raises:
            InputError: this is one, and it cannot draw here.
        """
        if self._process == os.getpid():
            return
        locks = () if self.executor.stays else (self._turn, self._one_run)
        free = [lock for lock in locks if lock.acquire(blocking=False)]
        for lock in free:
            lock.release()
        if self.executor.stays or len(free) < len(locks):
            alone = "" if self.device != CPU else ", or with `threads=1` before it, while nothing is drawn"
            raise InputError(
                f"this process was forked after the pipeline was loaded, and parts of it stayed behind; load "
                f"it after the fork{alone}"
            )
        self._process = os.getpid()

    def append(self, past: Value, new: Value) -> Value:
        return joined(self.to_host(past), self.to_host(new))

    def split(self, value: Value) -> list[Value]:
        if isinstance(value, View):
            return list(split_view(value))
        return list(self.to_host(value)[:, None])

    def half(self, value: Value) -> Value:
        return half_view(value) if isinstance(value, View) else first_half(self.to_host(value))

    def to_host(self, value: Value) -> NDArray[Any]:
        if isinstance(value, np.ndarray):
            return value
        with self._one_run:
            return self.executor.download(self._at(value) if isinstance(value, View) else value.binding)

    def mark(self) -> object:
        return self.executor.mark()

    def wait(self, mark: object) -> None:
        self.executor.wait(mark)

    def _laid(self, program: Program) -> Laid:
        """The plan for a program: one of those that are kept, or a new one."""
        key = (program.batch, *self._shape(program))
        if key not in [*self._plans][-1:] and self._size:
            self.executor.discard(self._arena, self._size)
        laid = self._plans.pop(key, None)
        if laid is None:
            laid = self._lay(make_plan(program, self.executor.writes_all))
        self._plans[key] = laid  # the last one used is the last to go
        return laid

    def _shape(self, program: Program) -> Iterator[object]:
        """What decides where tensors lie and what is captured: graphs, and sizes, some read on the host."""
        for run in program.runs():
            yield run.graph
            yield run.halved
            yield run.edited
            yield from (array.shape for array in run.constants.values())
            for name in self.manifest.contract(run.graph).deciding():
                yield run.constants[name].tobytes()

    def _lay(self, plan: Plan) -> Laid:
        while len(self._plans) >= MOST_PLANS:
            self._drop(self._plans.pop(next(iter(self._plans))))
        if plan.nbytes > self._size:
            for laid in self._plans.values():
                self.executor.forget(laid.calls)
                laid.bound.clear()
            if self._size:
                self.executor.free(self._arena)
            self._size = 0
            self._arena, self._size = self.executor.allocate(plan.nbytes), plan.nbytes
        calls = range(self._planned, self._planned + len(plan.calls))
        self._planned = calls.stop
        return Laid(plan, calls, self.executor.allocate(plan.constant_nbytes))

    def _drop(self, laid: Laid) -> None:
        self.executor.forget(laid.calls)
        self.executor.free(laid.constants)

    def _bound(self, value: Value, tensor: TensorSpec) -> _Own | Binding:
        """Where a value lies; one from the host is uploaded first."""
        if isinstance(value, View):
            return self._at(value)
        if isinstance(value, _Own):
            return value
        array = _typed(value, tensor)
        own = self._new(array.shape, array.dtype)
        self.executor.upload(own.binding.address, array, None)
        return own

    def _new(self, shape: Shape, dtype: np.dtype[Any]) -> _Own:
        """Memory outside the plan; it is used again once nobody holds the tensor any more."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        idle = self._idle.setdefault(nbytes, [])
        address = idle.pop() if idle else self.executor.allocate(nbytes)
        own = _Own(Binding(address, shape, dtype))
        weakref.finalize(own, _give_back, self.executor, self._idle, nbytes, address).atexit = False
        return own

    def _at(self, view: View) -> Binding:
        return Binding(self._arena + view.offset, view.shape, view.dtype)


def _give_back(executor: Executor, idle: dict[int, list[int]], nbytes: int, address: int) -> None:
    """Keep memory for a later tensor of its size, or free it where much is kept already."""
    if nbytes + sum(size * len(kept) for size, kept in idle.items()) > MOST_IDLE:
        executor.free(address)
    else:
        idle[nbytes].append(address)


class _Lease:
    """A drawing on its way through its plan."""

    def __init__(self, backend: PlannedBackend, laid: Laid) -> None:
        self._backend, self._laid = backend, laid
        self._next = 0
        self.over = False

    def run(self, run: Run, inputs: Values, wanted: frozenset[str]) -> Outputs:
        number, plan = self._next, self._laid.plan
        if self.over or number == len(plan.calls) or plan.calls[number].graph != run.graph:
            raise RunError(f"graph {run.graph}: is not what the plan of this drawing has next")
        self._next += 1
        call, backend, executor = plan.calls[number], self._backend, self._backend.executor
        with backend._one_run:
            for offset, nbytes in plan.idle.get(number, ()):
                executor.discard(backend._arena + offset, nbytes)
            stays = executor.on_host(run.graph)
            bindings, host, held = self._bound(number, stays), {}, []
            for tensor in self._backend._graphs[run.graph].inputs:
                name, value, view = tensor.name, inputs[tensor.name], call.inputs[tensor.name]
                if value is view:
                    continue  # it lies where the plan has it
                if name in stays:
                    host[name] = _typed(value, tensor)
                elif view is None or (isinstance(value, np.ndarray) and value.shape != view.shape):
                    held.append(backend._bound(value, tensor))
                    bindings[name] = _binding(held[-1])
                else:
                    self._supply(call, number, tensor, value, bindings[name])
            # Tensors from outside, and recorded numbers where fewer are planned, lie elsewhere the next time.
            executor.execute(run.graph, bindings, host, None if held else self._laid.calls[number])
        return dict(call.results)

    def _supply(
        self, call: PlannedCall, number: int, tensor: TensorSpec, value: Value, place: Binding
    ) -> None:
        """Copy what comes from the host to its place; a constant only if it is another one there."""
        key, laid = (self._laid.calls[number], tensor.name), self._laid
        if tensor.name in call.uploads:
            self._backend.executor.upload(place.address, _typed(value, tensor), key)
        elif tensor.name in call.constants and not same(laid.uploaded.get(key), value):
            self._backend.executor.upload(place.address, _typed(value, tensor), key)
            laid.uploaded[key] = value
        elif isinstance(value, View) and value != call.inputs[tensor.name]:
            raise RunError(f"graph {call.graph}: {tensor.name} is another tensor than in the plan")

    def _bound(self, number: int, stays: frozenset[str]) -> dict[str, Binding]:
        """Everything that a call has in planned memory."""
        if number not in self._laid.bound:
            call = self._laid.plan.calls[number]
            views = {k: v for k, v in {**call.inputs, **call.outputs}.items() if v and k not in stays}
            self._laid.bound[number] = {name: self._at(view) for name, view in views.items()}
        return dict(self._laid.bound[number])

    def _at(self, view: View) -> Binding:
        base = self._laid.constants if view.slot.constant else self._backend._arena
        return Binding(base + view.offset, view.shape, view.dtype)


@dataclass(frozen=True, eq=False)
class _Own:
    """A tensor in memory of its own."""

    binding: Binding


def _binding(value: _Own | Binding) -> Binding:
    return value.binding if isinstance(value, _Own) else value


def _typed(value: Value, tensor: TensorSpec) -> NDArray[Any]:
    return np.asarray(value, tensor.dtype, order="C")  # ascontiguousarray makes scalars 1-D
