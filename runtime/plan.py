"""Where every tensor of a picture lies, decided before the picture is drawn.

The plan is made by running the loop itself on a backend that computes nothing: it only notes
which graph runs with which tensors, and when each tensor is used for the last time. Tensors
that do not live at the same time then share memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import RunError
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backend import Backend, Value
from hart_runtime.runtime.bundle import Manifest
from hart_runtime.runtime.contract import NEW, PAST
from hart_runtime.runtime.loop import draw
from hart_runtime.runtime.shapes import Shape, cache_length, shape_of, solve

ALIGNMENT = 256
"""What TensorRT asks of the address of a binding."""
LARGE = 1 << 20
"""Bytes from which on it pays to give memory back between the stages of a picture."""


@dataclass(eq=False)
class Slot:
    """One tensor of the plan: an output, an uploaded input, or a layer's whole cache."""

    label: str
    shape: Shape
    dtype: np.dtype[Any]
    born: int
    """Number of the call that writes it."""
    dies: int
    """Number of the last call that reads it; the number of calls, if the host reads it at the end."""
    offset: int = 0
    """Bytes from the start of the arena."""

    @property
    def nbytes(self) -> int:
        return _nbytes(self.shape, self.dtype)


@dataclass(frozen=True)
class View:
    """A tensor inside a slot."""

    slot: Slot
    shape: Shape
    start: int = 0
    """Bytes from the start of the slot."""

    @property
    def offset(self) -> int:
        """Bytes from the start of the arena."""
        return self.slot.offset + self.start

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.slot.dtype

    @property
    def nbytes(self) -> int:
        return _nbytes(self.shape, self.dtype)


@dataclass(frozen=True)
class Outside:
    """A tensor that exists before the drawing, such as the text features."""

    shape: Shape


@dataclass
class Call:
    """One run of a graph: what is bound to each input and output."""

    graph: str
    inputs: dict[str, View | None] = field(default_factory=dict)
    """None for tensors from outside the drawing."""
    outputs: dict[str, View] = field(default_factory=dict)
    results: dict[str, View] = field(default_factory=dict)
    """What the loop gets: the outputs, and grown caches instead of new tokens (none at the last scale)."""
    uploads: tuple[str, ...] = ()
    """Inputs that the host supplies."""


@dataclass(frozen=True)
class Plan:
    """All calls of one drawing, in order, and the memory they need."""

    calls: list[Call]
    slots: list[Slot]
    nbytes: int
    """Size of the arena that holds every slot."""
    idle: dict[int, list[tuple[int, int]]]
    """Per call, offset and bytes of large parts of the arena that nothing uses from then on."""


def make_plan(manifest: Manifest, batch: int, settings: SamplingSettings) -> Plan:
    """Plan the drawing of ``batch`` pictures."""
    model = manifest.model
    planner = _Planner(manifest, batch)
    features = Outside((batch, model.context_token, model.context_dim))
    mask = np.ones((batch, model.context_token), np.bool_)
    draw(planner, manifest, features, mask, _Silence(batch), settings)
    return Plan(planner.calls, planner.slots, lay_out(planner.slots), idle_parts(planner.slots))


def lay_out(slots: list[Slot]) -> int:
    """Give every slot an offset so that no two that live at once overlap; returns the size.

    Largest first, each at the lowest offset that is free during its whole life.
    """
    placed: list[Slot] = []
    size = 0
    for slot in sorted(slots, key=lambda s: (-s.nbytes, s.born)):
        neighbours = [p for p in placed if p.born <= slot.dies and slot.born <= p.dies]
        offset = 0
        for other in sorted(neighbours, key=lambda p: p.offset):
            if offset + slot.nbytes <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.nbytes))
        slot.offset = offset
        size = max(size, offset + slot.nbytes)
        placed.append(slot)
    return _aligned(size)


def idle_parts(slots: list[Slot]) -> dict[int, list[tuple[int, int]]]:
    """Where large slots lay that no later one reuses, by the call after their last one."""
    idle: dict[int, list[tuple[int, int]]] = {}
    for slot in (s for s in slots if s.nbytes >= LARGE):
        end = slot.offset + slot.nbytes
        reused = any(
            s.born > slot.dies and s.offset < end and slot.offset < s.offset + s.nbytes for s in slots
        )
        if not reused:
            idle.setdefault(slot.dies + 1, []).append((slot.offset, slot.nbytes))
    return idle


class _Planner(Backend):
    """A backend that notes calls instead of computing."""

    name = device = "plan"

    def __init__(self, manifest: Manifest, batch: int) -> None:
        self.graphs = manifest.planned_graphs
        self.calls: list[Call] = []
        self.slots: list[Slot] = []
        self.cache_shape = (cache_length(manifest.model), 2 * batch, manifest.model.embed_dim)

    def prepare(self, batch: int, settings: SamplingSettings) -> None:
        pass

    def run(self, graph: str, inputs: Mapping[str, Value]) -> dict[str, Any]:
        spec = self.graphs[graph]
        _refuse_other_inputs(graph, set(inputs), {tensor.name for tensor in spec.inputs})
        now = len(self.calls)
        call = Call(graph)
        self.calls.append(call)
        shapes: dict[str, Shape] = {}
        uploads = []
        for tensor in spec.inputs:
            value = inputs[tensor.name]
            if isinstance(value, np.ndarray):
                if tensor.name.startswith(PAST):  # an empty one; the loop has the rows first
                    value = value.swapaxes(0, 1)
                value = self._new(f"{graph}.{tensor.name}", value.shape, tensor.dtype, now)
                if value.nbytes:  # scale 0 has no past
                    uploads.append(tensor.name)
            shapes[tensor.name] = value.shape
            if isinstance(value, View):
                value.slot.dies = now
            call.inputs[tensor.name] = value if isinstance(value, View) else None
        call.uploads = tuple(uploads)
        dims = solve(spec.inputs, shapes)
        results = call.results
        unread: View | None = None
        for tensor in spec.outputs:
            shape = shape_of(tensor, dims)
            name = tensor.name.removeprefix(NEW)
            past = call.inputs.get(PAST + name)
            if past is None and name != tensor.name:  # added to nothing: what the cache begins with
                cache = self._new(PAST + name, self.cache_shape, tensor.dtype, now)
                call.outputs[tensor.name] = results[name] = View(cache.slot, shape)
            elif past is None or not past.nbytes:
                view = self._new(f"{graph}.{tensor.name}", shape, tensor.dtype, now)
                call.outputs[tensor.name] = results[name] = view
            elif past.nbytes + _nbytes(shape, past.dtype) <= past.slot.nbytes:
                call.outputs[tensor.name] = View(past.slot, shape, past.nbytes)
                results[name] = View(past.slot, (past.shape[0] + shape[0], *shape[1:]))
            else:  # the last scale's: written because the graph returns them, one over the other
                unread = unread or self._new("unread", shape, tensor.dtype, now)
                call.outputs[tensor.name] = unread
        return dict(results)

    def split(self, value: Any) -> list[Any]:
        return split_view(value)

    def to_host(self, value: Any) -> NDArray[Any]:
        value.slot.dies = len(self.calls)
        return np.arange(np.prod(value.shape)).reshape(value.shape).astype(value.dtype)

    def _new(self, label: str, shape: Shape, dtype: str, now: int) -> View:
        slot = Slot(label, tuple(shape), np.dtype(dtype), now, now)
        self.slots.append(slot)
        return View(slot, slot.shape)


class _Silence:
    """Noise of the right shapes; a plan does not depend on its values."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def uniform(self, scale: int, count: int) -> NDArray[np.float32]:
        return np.zeros((self.batch, count), np.float32)

    def exponential(self, scale: int, count: int, vocab_size: int) -> NDArray[np.float32]:
        return np.zeros((self.batch, count, vocab_size), np.float32)

    def residual_start(self, count: int, channels: int) -> NDArray[np.float32]:
        return np.zeros((self.batch, count, channels), np.float32)

    def residual_step(self, step: int, count: int, channels: int) -> NDArray[np.float32]:
        return np.zeros((self.batch, count, channels), np.float32)


def split_view(view: View) -> list[View]:
    """One view per entry of the leading axis, which stays, with length 1."""
    step = view.nbytes // view.shape[0]
    return [View(view.slot, (1, *view.shape[1:]), view.start + i * step) for i in range(view.shape[0])]


def _nbytes(shape: Shape, dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _refuse_other_inputs(graph: str, fed: set[str], taken: set[str]) -> None:
    """What a graph does not take would be dropped in silence, and the picture drawn without it."""
    if extra := sorted(fed - taken):
        raise RunError(f"graph {graph}: the loop feeds {', '.join(extra)}, which it does not take")
    if missing := sorted(taken - fed):
        raise RunError(f"graph {graph}: the loop does not feed {', '.join(missing)}, which it takes")
