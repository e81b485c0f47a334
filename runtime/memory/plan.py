"""Where every tensor of a picture lies, decided before the picture is drawn.

The plan is made by running the loop itself on a backend that computes nothing: it only notes
which graph runs with which tensors, and when each tensor is used for the last time. Tensors
that do not live at the same time then share memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.noise import Array, Places, pool_size
from hart_runtime.runtime.backends.backend import Backend, Lease, Outputs, Values
from hart_runtime.runtime.contract import BRANCH, NEW, PAST
from hart_runtime.runtime.loop import draw, drawn
from hart_runtime.runtime.program import Program, Run, cache_of
from hart_runtime.runtime.shapes import Shape, shape_of, solve
from hart_runtime.runtime.spec import GraphSpec

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
    """Bytes from the start of the arena, or of the plan's constants."""
    constant: bool = False
    """Lies beside the arena: it keeps what was uploaded from picture to picture."""

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
        """Bytes from the start of the arena, or of the plan's constants."""
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
class PlannedCall:
    """One run of a graph: what is bound to each input and output."""

    graph: str
    inputs: dict[str, View | None] = field(default_factory=dict)
    """None for tensors from outside the drawing."""
    outputs: dict[str, View] = field(default_factory=dict)
    results: dict[str, View] = field(default_factory=dict)
    """What the loop gets: the outputs, and grown caches instead of new tokens."""
    uploads: tuple[str, ...] = ()
    """Inputs that the host supplies for every picture."""
    constants: tuple[str, ...] = ()
    """Inputs that the host supplies once, and again when a setting changes them."""


@dataclass(frozen=True)
class Plan:
    """All calls of one drawing, in order, and the memory they need."""

    calls: list[PlannedCall]
    slots: list[Slot]
    nbytes: int
    """Size of the arena that holds every slot but constants."""
    constant_nbytes: int
    idle: dict[int, list[tuple[int, int]]]
    """Per call, offset and bytes of large parts of the arena that nothing uses from then on."""

    @property
    def staged_nbytes(self) -> int:
        """Of page-locked memory on the host, where everything lies that is copied to the device."""
        views = (call.inputs[name] for call in self.calls for name in (*call.uploads, *call.constants))
        return sum(view.nbytes for view in views if view is not None)

    @property
    def cache_nbytes(self) -> int:
        """Of the KV cache."""
        return sum(slot.nbytes for slot in self.slots if slot.label.startswith(PAST))


def make_plan(program: Program, every_output: bool = False) -> Plan:
    """Follow a program without computing.

    Args:
        every_output: give each output a place, whether somebody reads it or not: what runs the graphs writes
            all of them.
    """
    planner = _Planner(program.graphs, every_output)
    given = _given(program.graphs[next(program.runs()).graph], program.batch)
    drawn(draw(planner, program, given, _Silence(program.batch)))
    moving = [slot for slot in planner.slots if not slot.constant]
    return Plan(planner.calls, planner.slots, lay_out(moving), _in_a_row(planner.slots), idle_parts(moving))


def _given(first: GraphSpec, batch: int) -> dict[str, Any]:
    """What the caller gives: features lie on the device already, masks and numbers come from the host."""
    shapes = {spec.name: shape_of(spec, {"batch": batch}) for spec in first.inputs}
    return {
        spec.name: Outside(shapes[spec.name])
        if np.dtype(spec.dtype).kind == "f"
        else np.ones(shapes[spec.name], spec.dtype)
        for spec in first.inputs
    }


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


def _in_a_row(slots: list[Slot]) -> int:
    """Give every constant an offset behind the last; returns the size."""
    size = 0
    for slot in (s for s in slots if s.constant):
        slot.offset = size
        size = _aligned(size + slot.nbytes)
    return size


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

    def __init__(self, graphs: Mapping[str, GraphSpec], every_output: bool) -> None:
        self.graphs = graphs
        self.every_output = every_output
        self.calls: list[PlannedCall] = []
        self.slots: list[Slot] = []

    def begin(self, program: Program) -> AbstractContextManager[Lease]:
        return contextlib.nullcontext(self)

    def run(self, run: Run, inputs: Values, wanted: frozenset[str] = frozenset()) -> Outputs:
        now = len(self.calls)
        call = PlannedCall(run.graph)
        self.calls.append(call)
        uploads: list[str] = []
        constants: list[str] = []
        shapes: dict[str, Shape] = {}
        for tensor in self.graphs[run.graph].inputs:
            value = inputs[tensor.name]
            if isinstance(value, np.ndarray):
                constant = tensor.name in run.constants
                value = self._new(f"{run.graph}.{tensor.name}", value.shape, tensor.dtype, constant)
                if value.nbytes:  # at the first scale there is no past
                    (constants if constant else uploads).append(tensor.name)
            shapes[tensor.name] = value.shape
            if isinstance(value, View):
                value.slot.dies = now
            call.inputs[tensor.name] = value if isinstance(value, View) else None
        call.uploads, call.constants = tuple(uploads), tuple(constants)
        dims = solve(self.graphs[run.graph].inputs, shapes)
        unread: dict[Shape, View] = {}  # written because the graph returns them, one over the other
        asked = wanted.union(run.also.values())
        for tensor in self.graphs[run.graph].outputs:
            shape, name, cache = shape_of(tensor, dims), tensor.name, cache_of(tensor.name)
            if cache in wanted:
                past = call.inputs[cache]
                assert past is not None
                call.outputs[name], call.results[cache] = self._grown(cache, past, shape, tensor.dtype)
            elif name.startswith(BRANCH) and name not in asked and not self.every_output:
                continue  # computed on the way, and not written
            elif name.startswith((NEW, BRANCH)) and name not in asked:
                unread[shape] = unread.get(shape) or self._new("unread", shape, tensor.dtype)
                call.outputs[name] = unread[shape]
            else:
                label = name if name.startswith(PAST) else f"{run.graph}.{name}"  # what a cache begins with
                view = self._new(label, shape, tensor.dtype)
                call.outputs[name] = call.results[name] = view
        return dict(call.results)

    def _grown(self, cache: str, past: View, new: Shape, dtype: str) -> tuple[View, View]:
        """Where new tokens of a cache go, and the cache with them."""
        if not past.nbytes:
            past = View(self._new(cache, new, dtype).slot, (0, *new[1:]))
        whole = (past.shape[0] + new[0], *new[1:])
        past.slot.shape = whole  # room for all that comes
        return View(past.slot, new, past.nbytes), View(past.slot, whole)

    def append(self, past: Any, new: Any) -> Any:
        raise NotImplementedError  # a drawing does not

    def split(self, value: Any) -> list[Any]:
        return split_view(value)

    def half(self, value: Any) -> Any:
        return half_view(value)

    def to_host(self, value: Any) -> NDArray[Any]:
        value.slot.dies = len(self.calls)
        return np.arange(np.prod(value.shape)).reshape(value.shape).astype(value.dtype)

    def mark(self) -> object:
        return None

    def wait(self, mark: object) -> None:
        pass

    def _new(self, label: str, shape: Sequence[int], dtype: str, constant: bool = False) -> View:
        now = len(self.calls) - 1
        slot = Slot(label, tuple(shape), np.dtype(dtype), now, now, constant=constant)
        self.slots.append(slot)
        return View(slot, slot.shape)


class _Silence:
    """Noise of the right shapes; a plan does not depend on its values."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def uniform(self, scale: int, count: int) -> Array:
        return np.zeros((self.batch, count), np.float32)

    def exponential(self, scale: int, count: int, vocab_size: int) -> tuple[Array, Places]:
        pool = np.zeros((self.batch, pool_size(count, vocab_size)), np.float32)
        return pool, np.zeros((self.batch, count), np.int64)

    def residual_start(self, count: int, channels: int) -> Array:
        return np.zeros((self.batch, count, channels), np.float32)

    def residual_step(self, step: int, count: int, channels: int) -> Array:
        return np.zeros((self.batch, count, channels), np.float32)

    def order(self, count: int) -> Places:
        return np.tile(np.arange(count, dtype=np.int64), (self.batch, 1))

    def token_start(self, step: int, count: int, channels: int) -> Array:
        return np.zeros((self.batch, count, channels), np.float32)

    def token_steps(self, step: int, runs: int, count: int, channels: int) -> Array:
        return np.zeros((self.batch, runs, count, channels), np.float32)


def split_view(view: View) -> list[View]:
    """One view per entry of the leading axis, which stays, with length 1."""
    step = view.nbytes // view.shape[0]
    return [View(view.slot, (1, *view.shape[1:]), view.start + i * step) for i in range(view.shape[0])]


def half_view(view: View) -> View:
    """The first half along the leading axis."""
    return View(view.slot, (view.shape[0] // 2, *view.shape[1:]), view.start)


def _nbytes(shape: Shape, dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
