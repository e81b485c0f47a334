"""Optimization profiles: which shapes an engine is built for. Plain data, no TensorRT."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hart_runtime.common.schedule import PUBLISHED_TOP_K
from hart_runtime.runtime.contract import Scales
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.shapes import Dims, Shape, evaluate, shape_of

LARGEST_TOP_K = 3840
"""TensorRT's TopK goes no further."""


@dataclass(frozen=True)
class Range:
    """Smallest, most important and largest shape of one input (or value, of a shape input)."""

    min: Shape
    opt: Shape
    max: Shape

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether a shape lies inside."""
        return len(shape) == len(self.min) and all(
            low <= n <= high for low, n, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True)
class Profile:
    """One optimization profile of an engine."""

    name: str
    shapes: dict[str, Range]
    """By input; every input has one."""


def scale_rows(manifest: Manifest, name: str, batch: int) -> list[tuple[str, Dims]]:
    """When a graph runs, with the dimensions it has then; one nameless row if it is always alike."""
    when = manifest.contract(name).scales
    if when is Scales.ONCE:
        return [("any", {"batch": batch})]
    rows = [(f"scale{k}", dims) for k, dims in enumerate(manifest.scale_dims(batch))]
    return rows if when is Scales.ALL else rows[:-1]


def make_profiles(manifest: Manifest, name: str, batches: tuple[int, int], per_scale: bool) -> list[Profile]:
    """Profiles of a graph that cover every scale and every batch from ``batches[0]`` to ``batches[1]``.

    Args:
        batches: smallest and largest; from 1 on for graphs that run one by one.
        per_scale: one profile per scale with its exact shapes, tuned for the smallest batch;
            otherwise a single one, tuned for the last scale.
    """
    if manifest.contract(name).one_by_one:
        batches = (1, batches[1])
    smallest, largest = (scale_rows(manifest, name, batch) for batch in batches)
    rows = [(label, [low, high]) for (label, low), (_, high) in zip(smallest, largest, strict=True)]
    if not per_scale:
        rows = [("all", [smallest[-1][1], *(dims for _, pair in rows for dims in pair)])]
    return [_profile(label, manifest, name, found) for label, found in rows]


def choose(profiles: Iterable[Profile], shapes: dict[str, Shape]) -> int:
    """Number of the first profile that holds all these input shapes.

    Raises:
        ValueError: none does; the message names what does not fit.
    """
    reasons = []
    for number, profile in enumerate(profiles):
        outside = [name for name, shape in shapes.items() if not profile.shapes[name].holds(shape)]
        if not outside:
            return number
        name = outside[0]
        allowed = profile.shapes[name]
        reasons.append(f"{profile.name}: {name} {allowed.min} to {allowed.max}, found {shapes[name]}")
    raise ValueError("; ".join(reasons) or "the engine has no profile")


def decided_ranges(manifest: Manifest, name: str) -> dict[str, Range]:
    """Values of the inputs of a graph that shapes depend on: numbers of codes that are kept."""
    largest = min(manifest.model.vocab_size, LARGEST_TOP_K)
    values = Range((1,), (min(PUBLISHED_TOP_K, largest),), (largest,))
    return dict.fromkeys(manifest.contract(name).deciding(), values)


def _profile(label: str, manifest: Manifest, name: str, rows: list[Dims]) -> Profile:
    """A profile that covers all of these dimensions, those of recordings too, and is tuned for the first."""
    best, sizes, replayed = rows[0], manifest.model.sizes, manifest.contract(name).replayed
    recorded = [dims | {d: evaluate(size, sizes | dims) for d, size in replayed.items()} for dims in rows]
    shapes = {}
    for spec in manifest.graphs[name].inputs:
        found = [shape_of(spec, dims) for dims in (*rows, *recorded)]
        low = tuple(min(sizes) for sizes in zip(*found, strict=True))
        high = tuple(max(sizes) for sizes in zip(*found, strict=True))
        shapes[spec.name] = Range(low, shape_of(spec, best), high)
    return Profile(label, shapes)
