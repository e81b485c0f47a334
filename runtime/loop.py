"""The loop: follows the program of a model family, the same for every family and backend.

The host only schedules and supplies random numbers. For HART the reference model does the same in
:func:`hart_runtime.hart.generate.generate`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.noise import Noise
from hart_runtime.runtime.ahead import Ahead
from hart_runtime.runtime.backends.backend import Backend, Lease, Outputs, Value, Values
from hart_runtime.runtime.program import Arrays, Program, Run, Step, state_name

Array = NDArray[np.float32]
State = dict[str, Value]
"""What later graphs take, by name."""
NOTHING: Arrays = MappingProxyType({})
Edit = Callable[[Run, str, NDArray[Any]], NDArray[Any]]
"""Of a run and an input of it by name: its value with what is kept of given pictures in it."""


def unchanged(run: Run, name: str, value: NDArray[Any]) -> NDArray[Any]:
    """Nothing is kept."""
    return value


@dataclass(frozen=True)
class Snapshot:
    """A drawing after one of its steps."""

    stage: str
    """SCALE, RESIDUAL or DECODER of :mod:`hart_runtime.runtime.stages`."""
    index: int
    total: int
    decode: Callable[[], Array]
    """Decodes the picture as it stands, (B, 3, H, W) in [0, 1]; InputError once the drawing went on."""
    seconds: dict[str, float]
    """Wall time per stage so far, in the order they ran."""


@dataclass(frozen=True)
class Drawing:
    """Result of one batch."""

    images: Array
    """(B, 3, H, W) in [0, 1]."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per stage, in the order they ran."""


def draw(
    backend: Backend,
    program: Program,
    given: Values,
    noise: Noise,
    paced: bool = False,
    threads: int | None = None,
    edit: Edit = unchanged,
) -> Generator[Snapshot, None, None]:
    """Draw a batch of pictures, step by step; the last snapshot holds them.

    The backend is held from the first step until the last, or until the iterator is closed.

    Args:
        program: what to do, see :meth:`hart_runtime.runtime.manifest.Manifest.program`.
        given: what the first graph takes and the host does not make: for HART text ``features``
            (B, T, D) and their ``mask`` (B, T).
        paced: let the device be one step ahead of what is told, and no more: for who shows progress or
            may stop. Without, the host waits for nothing but the pictures.
        threads: that draw random numbers meanwhile, at most.
        edit: of a program that keeps parts of given pictures, what puts them in.

    Raises:
        InputError: this thread is drawing on the backend already.
        RunError: a latent or a pixel is not finite, or a picture came out in one flat colour.
    """
    with backend.begin(program) as lease, contextlib.closing(Ahead(program, noise, threads)) as ahead:
        drawing = _Drawing(backend, lease, program, given, ahead, edit)
        marks: list[object] = []
        try:
            for step in program.steps[:-1]:
                drawing.advance(step)
                if paced:
                    marks.append(backend.mark())
                    if len(marks) > 1:
                        backend.wait(marks.pop(0))
                yield drawing.snapshot(step)
                drawing.resume()
            yield drawing.finish(program.steps[-1])
        finally:
            drawing.resume()


def drawn(
    snapshots: Generator[Snapshot, None, None], watch: Callable[[Snapshot], None] = lambda _: None
) -> Drawing:
    """Follow a drawing to its end."""
    with contextlib.closing(snapshots):  # also while what ``watch`` raised is being handled
        for snapshot in snapshots:
            watch(snapshot)
        return Drawing(snapshot.decode(), snapshot.seconds)


class _Drawing:
    """Where a drawing is, and its tensors."""

    def __init__(
        self, backend: Backend, lease: Lease, program: Program, given: Values, ahead: Ahead, edit: Edit
    ) -> None:
        self.backend, self.lease = backend, lease
        self.program, self.ahead, self.edit = program, ahead, edit
        self.state: State = dict(given)
        self.wanted = iter(program.wanted)
        self.steps = 0
        self.clock = _Clock()

    def advance(self, step: Step) -> None:
        """All graphs of a step."""
        for run in step.runs:
            wanted = next(self.wanted)
            for name in run.halved:
                self.state[name] = self.backend.half(self.state[name])
            self._edit(run, self.state)
            inputs = fed(run, self.program, self.state, self.ahead.take(run))
            outputs = self.lease.run(run, inputs, wanted)
            keep(outputs, run, self.state)
            for name in self.state.keys() - wanted:
                del self.state[name]  # and with it its memory, where nothing is planned
            self.clock.lap(run.stage)
        self.steps += 1

    def _edit(self, run: Run, state: State) -> None:
        """Put into what a run takes what is kept of given pictures."""
        for name in run.edited:
            state[name] = self.edit(run, name, self.backend.to_host(state[name]))

    def snapshot(self, step: Step) -> Snapshot:
        decode = functools.partial(self._preview, step, self.steps)
        return Snapshot(step.stage, step.index, step.total, decode, self.clock.seconds)

    def resume(self) -> None:
        """What the consumer did meanwhile is nobody's time, and its snapshot is over."""
        self.clock.restart()
        self.steps += 1

    def finish(self, step: Step) -> Snapshot:
        """The last step, and the pictures."""
        self.advance(step)
        latents = self.state[self.program.latent]
        images = self._decoded(latents, lambda run, inputs: self.lease.run(run, inputs, frozenset()))
        self.clock.lap(self.program.decode.stage)
        self._refuse_broken(self.backend.to_host(latents), images)
        return Snapshot(step.stage, step.index, step.total, lambda: images, self.clock.seconds)

    def _preview(self, step: Step, number: int) -> Array:
        """The picture after a step, through graphs beside those of the drawing."""
        if number != self.steps:
            raise InputError(
                "the drawing has gone on: a snapshot can be decoded until the next one is asked for"
            )
        state = dict(self.state)
        for run in step.preview:
            self._edit(run, state)
            outputs = self.backend.run(run, fed(run, self.program, state))
            keep(outputs, run, state)
        return self._decoded(state[self.program.latent], self.backend.run)

    def _decoded(self, latents: Value, run: Callable[[Run, Values], Outputs]) -> Array:
        """Pixels, one picture after another: the decoder's full-resolution activations are the largest."""
        program = self.program
        images = [
            run(program.decode, {program.latent: latent})[program.image]
            for latent in self.backend.split(latents)
        ]
        first, *more = [self.backend.to_host(image) for image in images]
        return np.concatenate([first, *more]) if more else first

    def _refuse_broken(self, latents: Array, images: Array) -> None:
        """Looked at after the last graph, so that no stage waits for the host.

        Every step adds to the latent, so a NaN of any of them is still there; a decoder may hide it.
        """
        if not np.isfinite(latents).all():
            steps = " or ".join(dict.fromkeys(step.stage for step in self.program.steps[:-1]))
            raise RunError(f"{steps}: the latent holds NaN or infinity, there is no picture")
        for number, image in enumerate(images):
            low, high = image.min(), image.max()  # of NaN if there is one
            if not np.isfinite([low, high]).all():
                raise RunError(f"decoder: picture {number} holds NaN or infinity")
            if low == high:
                raise RunError(f"decoder: picture {number} is one flat colour ({low:.3f})")


def fed(run: Run, program: Program, state: State, random: Arrays = NOTHING) -> dict[str, Value]:
    """What a graph is given: what the host makes for this run, else what graphs before it returned.

    Raises:
        RunError: the program and the contract contradict each other.
    """
    host = {**run.constants, **random}
    taken = [spec.name for spec in program.graphs[run.graph].inputs]
    if extra := sorted(set(host) - set(taken)):
        raise RunError(f"graph {run.graph}: the loop feeds {', '.join(extra)}, which it does not take")
    if missing := [name for name in taken if name not in host and name not in state]:
        raise RunError(f"graph {run.graph}: the loop does not feed {', '.join(missing)}, which it takes")
    return {name: host[name] if name in host else state[name] for name in taken}


def keep(outputs: Outputs, run: Run, state: State) -> None:
    """Put what a graph returned beside the rest, under the names that later graphs take."""
    for name, value in outputs.items():
        state[state_name(name)] = value
    for name, source in run.also.items():
        state[name] = state[source]


class _Clock:
    """Wall time per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def restart(self) -> None:
        self.last = time.perf_counter()
