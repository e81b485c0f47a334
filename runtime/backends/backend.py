"""What the loop asks of a backend: it runs one graph of a bundle and knows nothing of the loop.

Tensors stay where they were computed: what a graph returns is passed to the next one as it
is, and only :meth:`Backend.to_host` brings anything back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.contract import NEW
from hart_runtime.runtime.program import Program, Run, cache_of

Tensor = Any
"""A device tensor of the backend, opaque to the loop."""
Value = Tensor | NDArray[Any]
Values = Mapping[str, Value]
Outputs = dict[str, Tensor]


class Limits(Protocol):
    """What a backend was built for, where it does not draw everything that its bundle could."""

    @property
    def batches(self) -> range:
        """Numbers of pictures that it draws at once."""

    def check(self, program: Program, settings: SamplingSettings) -> None:
        """Refuse a drawing that was not built for.

        Raises:
            InputError: with what there is, and the command that builds more.
        """


class Lease(Protocol):
    """One drawing's hold on a backend: nobody else draws there until it ends."""

    def run(self, run: Run, inputs: Values, wanted: frozenset[str]) -> Outputs:
        """Run the program's next graph.

        Returns its outputs by name. New tokens of a cache that ``wanted`` names come back as the cache
        that has them at its end, under its name; new tokens that it does not name do not come back.
        """


class Backend(Protocol):
    """What the loop needs. Arrays given as inputs are uploaded, tensors are used in place."""

    name: str
    """As in :data:`hart_runtime.runtime.backends.registry.BACKENDS`."""
    device: str
    limits: Limits | None = None
    """None for a backend that draws whatever its bundle can."""

    def begin(self, program: Program) -> AbstractContextManager[Lease]:
        """Take the backend for one drawing; waits for another thread's.

        Raises:
            InputError: this thread holds it already.
        """

    def run(self, run: Run, inputs: Values) -> Outputs:
        """Run a graph outside of any drawing, or beside one; all outputs by name, on the device."""

    def append(self, past: Value, new: Value) -> Value:
        """Two tensors as one, along the first axis; outside of any drawing."""

    def split(self, value: Tensor) -> list[Tensor]:
        """One tensor per picture of a batch, each with a leading axis of 1."""

    def half(self, value: Value) -> Value:
        """The first half of its rows: of both guidance halves the conditional one."""

    def to_host(self, value: Value) -> NDArray[Any]:
        """Copy a tensor to the host, waiting for it; an array is returned as it is."""

    def mark(self) -> object:
        """A mark behind everything that was asked for so far."""

    def wait(self, mark: object) -> None:
        """Until everything before a mark is done."""


class Unplanned:
    """A backend whose drawings run graph by graph in whatever memory there is, whatever they are fed."""

    def __init__(self, backend: Backend) -> None:
        self.name, self.device, self.limits = backend.name, backend.device, backend.limits
        self.run, self.append, self.split = backend.run, backend.append, backend.split
        self.half = backend.half
        self.to_host, self.mark, self.wait = backend.to_host, backend.mark, backend.wait

    def begin(self, program: Program) -> AbstractContextManager[Lease]:
        return contextlib.nullcontext(_Unplanned(self))


class _Unplanned:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def run(self, run: Run, inputs: Values, wanted: frozenset[str]) -> Outputs:
        outputs = self._backend.run(run, inputs)
        for name in [name for name in outputs if name.startswith(NEW) and name not in wanted]:
            new, cache = outputs.pop(name), cache_of(name)
            if cache in wanted:
                outputs[cache] = self._backend.append(inputs[cache], new)
        return outputs


Around = Callable[[Run, Values, Callable[[Values], Outputs]], Outputs]
"""Called with a run, what it is fed, and a function that does it."""


class Watched:
    """A backend every run of which passes through a function, which may look, or feed something else."""

    def __init__(self, backend: Backend, around: Around) -> None:
        self.backend, self.around = backend, around
        self.name, self.device, self.limits = backend.name, backend.device, backend.limits
        self.append, self.split, self.half = backend.append, backend.split, backend.half
        self.to_host, self.mark, self.wait = backend.to_host, backend.mark, backend.wait

    def run(self, run: Run, inputs: Values) -> Outputs:
        return self.around(run, inputs, lambda fed: self.backend.run(run, fed))

    @contextlib.contextmanager
    def begin(self, program: Program) -> Iterator[Lease]:
        with self.backend.begin(program) as lease:
            yield _Watched(lease, self.around)


class _Watched:
    def __init__(self, lease: Lease, around: Around) -> None:
        self._lease, self._around = lease, around

    def run(self, run: Run, inputs: Values, wanted: frozenset[str]) -> Outputs:
        return self._around(run, inputs, lambda fed: self._lease.run(run, fed, wanted))


def first_half(value: NDArray[Any]) -> NDArray[Any]:
    """Of an array of the host, along the first axis."""
    return value[: len(value) // 2]


def joined(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Two arrays of the host along the first axis; the first may be empty, whatever its type."""
    return np.concatenate([one.astype(other.dtype, copy=False), other])
