"""What a drawing does, in order: a list of steps, each some runs of graphs.

A model family makes the list (see :mod:`hart_runtime.runtime.families`), the loop follows it
(:mod:`hart_runtime.runtime.loop`). Between runs tensors are kept by name: a graph takes those that its
contract names from what graphs before it returned, unless the host feeds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.noise import Noise
from hart_runtime.runtime.contract import NEW, OUT, PAST
from hart_runtime.runtime.spec import GraphSpec

Arrays = Mapping[str, NDArray[Any]]


def none(noise: Noise) -> Arrays:
    """No random number."""
    return {}


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a graph."""

    graph: str
    stage: str
    """Under which its time is measured, see :mod:`hart_runtime.runtime.stages`."""
    index: int = 0
    """Of the scale, the iteration or the denoising step it belongs to."""
    constants: Arrays = field(default_factory=dict)
    """What the host feeds and only settings change."""
    random: Callable[[Noise], Arrays] = none
    """What the host feeds anew for every picture."""
    also: Mapping[str, str] = field(default_factory=dict)
    """More names for outputs: what graphs after it take under them."""
    halved: frozenset[str] = frozenset()
    """What goes on without its unconditional half from this run on."""
    edited: tuple[str, ...] = ()
    """What of its inputs passes through the host, which puts in what is kept of given pictures."""
    last: int = 0
    """Number of its last denoising step, where a graph runs more than once in an iteration."""


@dataclass(frozen=True, eq=False)
class Step:
    """Some runs, after which there is something to tell, and to show."""

    stage: str
    """A scale, a step of the residual, or the decoder."""
    index: int
    total: int
    runs: tuple[Run, ...]
    preview: tuple[Run, ...]
    """Makes a latent for the decoder of what there is after this step; nothing to do for most."""


@dataclass(frozen=True, eq=False)
class Program:
    """All steps of one drawing."""

    batch: int
    """Pictures that it draws."""
    graphs: Mapping[str, GraphSpec]
    steps: tuple[Step, ...]
    decode: Run
    """Makes pixels of a latent, picture by picture: after the last step, and for previews."""
    wanted: tuple[frozenset[str], ...]
    """For every run, the names that are still taken from the state after it."""
    latent: str
    image: str
    """What ``decode`` takes and returns."""

    def runs(self) -> Iterator[Run]:
        """Those of all steps, without the decoder's."""
        for step in self.steps:
            yield from step.runs


def make_program(
    batch: int, graphs: Mapping[str, GraphSpec], steps: tuple[Step, ...], decode: Run
) -> Program:
    """Follow the tensors from the last run to the first, and note which are still needed where."""

    def taken(run: Run) -> set[str]:
        return {spec.name for spec in graphs[run.graph].inputs} - set(run.constants)

    (latent,), (image,) = graphs[decode.graph].inputs, graphs[decode.graph].outputs
    wanted: list[frozenset[str]] = []
    needs = {latent.name}
    for step in reversed(steps):
        if not step.preview:
            needs |= {latent.name}
        for run in step.preview:
            needs |= taken(run)
        for run in reversed(step.runs):
            wanted.append(frozenset(needs))
            needs = {run.also.get(name, name) for name in needs}
            needs -= {state_name(spec.name) for spec in graphs[run.graph].outputs}
            needs |= taken(run)
    return Program(batch, graphs, steps, decode, tuple(reversed(wanted)), latent.name, image.name)


def state_name(output: str) -> str:
    """The name under which later graphs find an output."""
    return output.removesuffix(OUT)


def cache_of(output: str) -> str | None:
    """Name of the cache that an output adds tokens to."""
    return PAST + output.removeprefix(NEW) if output.startswith(NEW) else None


def same(one: NDArray[Any] | None, other: NDArray[Any]) -> bool:
    """Whether what was fed before is fed again; NaN counts as equal to itself."""
    return one is other or (one is not None and one.shape == other.shape and bool(np.array_equal(one, other)))
