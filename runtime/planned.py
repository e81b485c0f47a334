"""A backend whose memory is planned before each drawing, over any executor of graphs.

The loop's n-th run is the plan's n-th call, so every tensor of every picture lies where it lay
in the picture before: an executor can capture a call once and replay it. Calls that are not in
the plan (previews, the text encoder) get memory of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backend import Backend, Value
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.contract import NEW, PAST, TEXT
from hart_runtime.runtime.plan import Call, Plan, View, make_plan, split_view
from hart_runtime.runtime.shapes import Shape, shape_of, solve
from hart_runtime.runtime.spec import TensorSpec


@dataclass(frozen=True)
class Binding:
    """An address with the shape and type of what lies there."""

    address: int
    shape: Shape
    dtype: np.dtype[Any]


class Executor(Protocol):
    """Memory of a device, and graphs that run on it. Everything happens in the order asked for."""

    name: str
    device: str

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory."""

    def free(self, address: int) -> None:
        """Release memory, once everything asked for before is done."""

    def discard(self, address: int, nbytes: int) -> None:
        """What lies in this part of an allocation is not needed any more; more will be written later."""

    def upload(self, address: int, array: NDArray[Any], slot: object) -> None:
        """Copy an array to the device. With a ``slot`` nobody waits: the host buffer behind the
        copy belongs to the slot, and is used again only after a download.
        """

    def download(self, binding: Binding) -> NDArray[Any]:
        """Wait for everything and copy to the host."""

    def execute(
        self, graph: str, bindings: Mapping[str, Binding], host: Mapping[str, NDArray[Any]], call: int | None
    ) -> None:
        """Run a graph without waiting.

        ``host`` holds the inputs the graph wants on the host (see :meth:`on_host`). ``call`` is
        the number of the call in the plan; with the same number come the same addresses,
        shapes and host inputs until :meth:`forget`.
        """

    def on_host(self, graph: str) -> frozenset[str]:
        """Inputs that the graph reads on the host, because shapes depend on them."""

    def forget(self) -> None:
        """The plan changes: drop what was captured for calls."""


class PlannedBackend(Backend):
    """Runs the loop's graphs at planned addresses."""

    def __init__(self, bundle: Bundle, executor: Executor) -> None:
        self.manifest = bundle.manifest
        self._graphs = bundle.manifest.planned_graphs
        self.executor = executor
        self.name, self.device = executor.name, executor.device
        self._planned_for: tuple[int, SamplingSettings] | None = None
        self._plan: Plan | None = None
        self._arena = 0
        self._next = 0
        self._idle: dict[int, list[int]] = {}

    def prepare(self, batch: int, settings: SamplingSettings) -> None:
        self._next = 0
        if self._planned_for == (batch, settings):
            return
        plan = make_plan(self.manifest, batch, settings)
        self.executor.forget()
        if self._plan is not None:
            self.executor.free(self._arena)
        self._plan, self._planned_for = None, None
        self._arena = self.executor.allocate(plan.nbytes)
        self._plan, self._planned_for = plan, (batch, settings)

    def run(self, graph: str, inputs: Mapping[str, Value]) -> dict[str, Any]:
        number = self._planned(graph, inputs)
        if number is None:
            return self._run_outside(graph, inputs)
        assert self._plan is not None
        call = self._plan.calls[number]
        self._next = number + 1
        for offset, nbytes in self._plan.idle.get(number, ()):
            self.executor.discard(self._arena + offset, nbytes)
        spec = self._graphs[graph]
        stays = self.executor.on_host(graph)
        bindings, host, held = {}, {}, []
        for tensor in spec.inputs:
            name, value, view = tensor.name, inputs[tensor.name], call.inputs[tensor.name]
            if name in stays:
                host[name] = _typed(value, tensor)
            elif view is None:
                held.append(self._bound(value, tensor))
                bindings[name] = _binding(held[-1])
            else:
                bindings[name] = self._at(view)
                if name in call.uploads:
                    self.executor.upload(bindings[name].address, _typed(value, tensor), (number, name))
        bindings |= {name: self._at(view) for name, view in call.outputs.items()}
        # With tensors from outside, addresses are not the same the next time.
        self.executor.execute(graph, bindings, host, None if held else number)
        return dict(call.results)

    def split(self, value: Any) -> list[Any]:
        if isinstance(value, View):
            return list(split_view(value))
        return list(self.to_host(value)[:, None])

    def to_host(self, value: Value) -> NDArray[Any]:
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, View):
            return self.executor.download(self._at(value))
        return self.executor.download(value.binding)

    def _planned(self, graph: str, inputs: Mapping[str, Value]) -> int | None:
        """Number of the call in the plan, if this run is the one that the plan has next."""
        if self._plan is None or self._next >= len(self._plan.calls):
            return None
        call = self._plan.calls[self._next]
        return self._next if _fits(call, graph, inputs) else None

    def _run_outside(self, graph: str, inputs: Mapping[str, Value]) -> dict[str, Any]:
        """A run with memory of its own; caches are given and returned as ONNX Runtime has them."""
        spec = self._graphs[graph]
        added = [t.name.removeprefix(NEW) for t in spec.outputs if t.name.startswith(NEW)]
        caches = {p + k: self.to_host(inputs[p + k]) for k in added for p in (PAST, TEXT) if p + k in inputs}
        inputs = {**inputs, **{name: cache.swapaxes(0, 1) for name, cache in caches.items()}}
        stays = self.executor.on_host(graph)
        host = {t.name: _typed(inputs[t.name], t) for t in spec.inputs if t.name in stays}
        held = {t.name: self._bound(inputs[t.name], t) for t in spec.inputs if t.name not in stays}
        bindings = {name: _binding(value) for name, value in held.items()}
        shapes = {name: b.shape for name, b in bindings.items()} | {k: v.shape for k, v in host.items()}
        dims = solve(spec.inputs, shapes)
        outputs: dict[str, Any] = {
            t.name: self._new(shape_of(t, dims), np.dtype(t.dtype)) for t in spec.outputs
        }
        bindings |= {name: own.binding for name, own in outputs.items()}
        self.executor.execute(graph, bindings, host, None)
        for name in added:
            new = self.to_host(outputs.pop(NEW + name)).swapaxes(0, 1)
            past = caches.get(PAST + name, new[:, :0])
            outputs[name] = np.concatenate([past, new], axis=1)
        return outputs

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
        weakref.finalize(own, idle.append, address)
        return own

    def _at(self, view: View) -> Binding:
        return Binding(self._arena + view.offset, view.shape, view.dtype)


@dataclass(frozen=True, eq=False)
class _Own:
    """A tensor in memory of its own."""

    binding: Binding


def _binding(value: _Own | Binding) -> Binding:
    return value.binding if isinstance(value, _Own) else value


def _fits(call: Call, graph: str, inputs: Mapping[str, Value]) -> bool:
    """Whether a run hands over exactly the tensors that the plan expects."""
    if call.graph != graph:
        return False
    for name, view in call.inputs.items():
        value = inputs[name]
        if view is None:  # from outside the drawing: whatever it is
            continue
        if isinstance(value, np.ndarray):
            if view.nbytes and (name not in call.uploads or value.shape != view.shape):
                return False
        elif value != view:
            return False
    return True


def _typed(value: Value, tensor: TensorSpec) -> NDArray[Any]:
    return np.asarray(value, tensor.dtype, order="C")  # ascontiguousarray makes scalars 1-D
